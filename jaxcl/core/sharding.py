"""One table path -> sharding, made of the model's logical axes and the experiment's rules.

The same table places weights, gradients, optimizer moments, memories and teachers; propagation by the compiler
is never relied on, because ``zeros_like`` of a sharded array is replicated under Auto axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.errors import RequestError, nearest

Rule = str | Sequence[str]
RULES: dict[str, Rule] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "model",
    "heads": "model",
    "kv": "model",
    "mlp": "model",
}
"""Default {logical axis: mesh axis, or several}; mesh axes that a mesh lacks are left out, logical axes without a rule
are replicated. ``data``: rows alone. ``fsdp``: rows, and the width of weights, which are gathered as they are used
(Rajbhandari et al. 2020, ZeRO stage 3). ``model``: heads, hidden units and words (Shoeybi et al. 2019)."""


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over the first ``prod(shape)`` devices, axes in Auto mode; all devices as ``data`` by default. One size
    may be -1: what the others leave.

    Raises RequestError when there are too few devices.
    """
    shape = mesh_sizes(shape, jax.device_count())
    need = math.prod(shape.values())
    if need > jax.device_count():
        raise RequestError(f"the mesh {shape} needs {need} devices; there are {jax.device_count()}")
    axes = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes, devices=jax.devices()[:need])


def mesh_sizes(shape: Mapping[str, int] | None, devices: int) -> dict[str, int]:
    """{axis: size} with a -1 filled in. RequestError on sizes below 1, two of -1, and a rest that does not come out."""
    given = dict(shape or {"data": devices})
    open_, known = [k for k, v in given.items() if v == -1], math.prod(v for v in given.values() if v != -1)
    if len(open_) > 1 or known < 1 or (open_ and devices % known):
        wanted = "sizes of at least 1, one of them -1 for what the others leave"
        raise RequestError(f"the mesh {given} on {devices} devices; accepted: {wanted}")
    return given | dict.fromkeys(open_, devices // known)


class Placement:
    """Where every array of a run lives. ``axes``: {path: logical name or None per dimension}."""

    def __init__(self, mesh: Mesh, axes: Mapping[str, tuple[str | None, ...]], rules: Mapping[str, Rule] | None = None):
        self.mesh = mesh
        self.axes = dict(axes)
        given = RULES if rules is None else rules
        self.rules = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in given.items()}
        for logical, names in self.rules.items():
            for axis in names if rules is not None else ():
                if axis not in mesh.axis_names:
                    raise RequestError(f"rule {logical!r}: no mesh axis {axis!r}; {nearest(axis, mesh.axis_names)}")
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, self._spec(("batch",), None))

    def _spec(self, logical: tuple[str | None, ...], shape: tuple[int, ...] | None) -> PartitionSpec:
        """Mesh axes by dimension. An axis serves one dimension, and only one that it divides: others stay whole."""
        used: set[str] = set()
        out: list[Any] = []
        for i, name in enumerate(logical):
            mine: list[str] = []
            for axis in self.rules.get(name, ()) if name else ():
                parts = math.prod(self.mesh.shape.get(a, 1) for a in (*mine, axis))
                free = axis in self.mesh.shape and axis not in used
                if free and (shape is None or shape[i] % parts == 0):
                    used.add(axis)
                    mine.append(axis)
            out.append(tuple(mine) if len(mine) > 1 else mine[0] if mine else None)
        return PartitionSpec(*out)

    def param(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of an array that belongs to the parameter ``path``, right-aligned to its axes.

        A memory with more leading axes than its parameter keeps those whole; one whose trailing shape does not
        fit the parameter's rank is replicated.
        """
        logical = self.axes.get(path)
        if logical is None or len(shape) < len(logical):
            return self.replicated
        lead = len(shape) - len(logical)
        return NamedSharding(self.mesh, self._spec((None,) * lead + tuple(logical), shape))

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
        """The pytree on its devices; ``copy`` forces fresh buffers, so that donating them harms nobody.

        What lives on the host has to be the same in every process, each of which takes its own part.
        """
        return jax.tree.map(lambda x, s: placed(x, s, copy=copy), tree, self.tree(tree))

    def batch_of(self, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of an array with a batch's rows in front; mesh axes that do not divide them are left out."""
        return NamedSharding(self.mesh, self._spec(("batch",), shape)) if shape else self.replicated

    def rows_here(self, n: int) -> np.ndarray:
        """int64: which of a batch's ``n`` rows the devices of this process hold, ascending."""
        held = self.batch_of((n,)).addressable_devices_indices_map((n,)).values()
        return np.unique(np.concatenate([np.arange(n, dtype=np.int64)[index] for index in held if index is not None]))

    def batch(self, batch: Any) -> Any:
        """A host batch, whole and the same in every process, as global arrays, rows sharded over the axes of ``batch``.
        Arrays that are on devices already stay as they are."""
        put = lambda x: x if isinstance(x, jax.Array) else placed(x, self.batch_of(np.shape(x)))  # noqa: E731
        return jax.tree.map(put, batch)

    def share(self, batch: Any, total: int) -> Any:
        """The same of a batch of ``total`` rows of which every process gives its own, `rows_here`."""
        held, sharding = self.rows_here(total), self.batch_of((total,))

        def put(x: np.ndarray) -> jax.Array:
            if sharding.is_fully_addressable:
                return jax.device_put(x, sharding)
            part = lambda i: x[np.searchsorted(held, np.arange(total)[i[0]])][:, *i[1:]]  # noqa: E731
            return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

        return jax.tree.map(put, batch)

    def abstract(self, tree: Any) -> Any:
        """Shapes with shardings, for compiling ahead and for restoring."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, self.tree(tree)
        )


def placed(x: Any, sharding: NamedSharding, *, copy: bool = False) -> jax.Array:
    """An array under this sharding. ``copy``: in a buffer of its own in any case."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=False if copy else None)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # in several processes already
        return x if x.sharding == sharding and not copy else _copier(sharding)(x)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


@functools.cache
def _copier(sharding: NamedSharding) -> Callable[[Any], jax.Array]:
    return jax.jit(jnp.copy, out_shardings=sharding)  # without jnp.copy what comes out may be what went in


def replicated_leaves(compiled: Any, least: int) -> dict[str, int]:
    """{path: bytes} of what a compiled function takes or gives of at least ``least`` bytes that every device holds
    whole, though there are several. ``compiled``: of ``jax.jit(f).lower(...).compile()``."""
    ins, outs = (compiled.args_info, compiled.input_shardings), (compiled.out_info, compiled.output_shardings)
    found = {}
    for side, (infos, shardings) in {"in": ins, "out": outs}.items():
        leaves = jax.tree_util.tree_leaves_with_path(infos)
        for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings, is_leaf=lambda s: s is None), strict=True):
            size = math.prod(x.shape) * x.dtype.itemsize
            if sharding is None:  # an argument that is not used
                continue
            if size >= least and sharding.is_fully_replicated and sharding.num_devices > 1:
                found[side + jax.tree_util.keystr(path)] = size
    return found
