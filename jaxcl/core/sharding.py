"""One table path -> sharding, made of the model's logical axes and the experiment's rules.

The same table places weights, gradients, optimizer moments, memories and teachers; propagation by the compiler
is never relied on, because ``zeros_like`` of a sharded array is replicated under Auto axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.errors import RequestError, nearest

RULES: dict[str, str] = {"batch": "data", "vocab": "model", "heads": "model", "kv": "model", "mlp": "model"}
"""Default {logical axis: mesh axis}; logical axes without a rule are replicated."""


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over the first ``prod(shape)`` devices, axes in Auto mode; all devices as ``data`` by default.

    Raises RequestError when there are too few devices.
    """
    shape = dict(shape or {"data": jax.device_count()})
    need = math.prod(shape.values())
    if need > jax.device_count() or need < 1:
        raise RequestError(f"the mesh {shape} needs {need} devices; there are {jax.device_count()}")
    axes = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes, devices=jax.devices()[:need])


class Placement:
    """Where every array of a run lives. ``axes``: {path: logical name or None per dimension}."""

    def __init__(self, mesh: Mesh, axes: Mapping[str, tuple[str | None, ...]], rules: Mapping[str, str] | None = None):
        self.mesh = mesh
        self.axes = dict(axes)
        self.rules = dict(RULES if rules is None else rules)
        for logical, axis in self.rules.items():
            if rules is not None and axis not in mesh.axis_names:
                raise RequestError(
                    f"rule {logical!r}: no mesh axis {axis!r}; {nearest(axis, mesh.axis_names)}"
                )
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(*self._mesh_axes(("batch",), None)))

    def _mesh_axes(self, logical: tuple[str | None, ...], shape: tuple[int, ...] | None) -> list[str | None]:
        used: set[str] = set()
        out: list[str | None] = []
        for i, name in enumerate(logical):
            axis = self.rules.get(name) if name else None
            # A dimension that the mesh axis does not divide stays whole; a mesh axis serves one dimension.
            fits = axis in self.mesh.axis_names and axis not in used
            if fits and (shape is None or shape[i] % self.mesh.shape[axis] == 0):
                assert axis is not None
                used.add(axis)
                out.append(axis)
            else:
                out.append(None)
        return out

    def param(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of an array that belongs to the parameter ``path``, right-aligned to its axes.

        A memory with more leading axes than its parameter keeps those whole; one whose trailing shape does not
        fit the parameter's rank is replicated.
        """
        logical = self.axes.get(path)
        if logical is None or len(shape) < len(logical):
            return self.replicated
        lead = len(shape) - len(logical)
        return NamedSharding(self.mesh, PartitionSpec(*self._mesh_axes((None,) * lead + tuple(logical), shape)))

    def tree(self, tree: Any) -> Any:
        """Shardings for a pytree of arrays (or shapes): by the last dict key that is a parameter path."""

        def place(path: tuple, leaf: Any) -> NamedSharding:
            for entry in reversed(path):
                key = getattr(entry, "key", None)
                if isinstance(key, str) and key in self.axes:
                    return self.param(key, tuple(np.shape(leaf)))
            return self.replicated

        return jax.tree_util.tree_map_with_path(place, tree)

    def put(self, tree: Any, *, copy: bool = False) -> Any:
        """The pytree on its devices; ``copy`` forces fresh buffers, so that donating them harms nobody."""
        move = lambda x, s: jax.device_put(x, s, may_alias=False if copy else None)  # noqa: E731
        return jax.tree.map(move, tree, self.tree(tree))

    def batch(self, batch: Any) -> Any:
        """A host batch (this process's rows) as global arrays, rows sharded over the data axis.

        Arrays that are on devices already stay as they are; what the data axis does not divide is replicated.
        """
        parts = math.prod(self.mesh.shape[a] for a in self.rows.spec if a is not None)

        def put(x: Any) -> Any:
            if isinstance(x, jax.Array):
                return x
            x = np.asarray(x)
            even = x.ndim and (x.shape[0] * jax.process_count()) % parts == 0
            return jax.make_array_from_process_local_data(self.rows if even else self.replicated, x)

        return jax.tree.map(put, batch)

    def abstract(self, tree: Any) -> Any:
        """Shapes with shardings, for compiling ahead and for restoring."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, self.tree(tree)
        )
