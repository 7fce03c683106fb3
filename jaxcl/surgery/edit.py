"""A surgery's Edit: what it did to parameters, so that every memory that mirrors them can follow.

A tensor may start afresh, go, or move: be renamed, copied, cut from a stack or put into one, and grow along its axes
by an index map. A memory is carried by its kind. Where growth repeats positions, a ``value`` (an anchor, a teacher) is
divided as the weights are, a ``gradient`` (a momentum) as gradients are, a ``square`` (a Fisher, a second moment) by
the square of that; a ``mask`` is copied. Of what starts afresh the value is the new one, the others are zero: else
EWC would anchor O-LoRA's fresh adapter to the one that just moved into the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.types import World

KINDS = ("value", "gradient", "square", "mask")


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where the entries of an edited tensor come from.

    parts: (old path, row of its stack or None), one per layer of the new tensor. rank: axes of one layer's tensor.
    index: {axis, from the right: old position of every new one; -1 is a new entry}. value, gradient: {axis: what a
    value, a gradient is divided by at every new position}. Each is [new], or [parts, new] where layers differ. fill:
    values of new entries, broadcast to one layer's tensor. fresh: a copy without a past: values are copied, gradients
    and squares are zero.
    """

    parts: tuple[tuple[str, int | None], ...]
    rank: int
    stacked: bool = False
    index: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    value: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    gradient: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    fill: Any = 0.0
    fresh: bool = False

    def build(self, table: Mapping[str, Any], kind: str) -> Any:
        """The new leaf out of a table that has all the parts; leading axes of its own are kept."""
        layers = [self._layer(table[path], row, kind, j) for j, (path, row) in enumerate(self.parts)]
        return jnp.stack(layers, axis=layers[0].ndim - self.rank) if self.stacked else layers[0]

    def _layer(self, x: Any, row: int | None, kind: str, part: int) -> Any:
        if row is not None:
            x = jnp.take(x, row, axis=x.ndim - self.rank - 1)
        taken = self._taken(x, kind, part)
        return jnp.zeros_like(taken) if self.fresh and kind in ("gradient", "square") else taken

    def _taken(self, x: Any, kind: str, part: int) -> Any:
        for axis, indices in self.index.items():
            index = indices[part] if indices.ndim == 2 else indices
            known = _along(index >= 0, axis)
            taken = jnp.take(x, np.maximum(index, 0), axis=axis)
            x = taken if np.all(known) else jnp.where(known, taken, self.fill if kind == "value" else 0).astype(x.dtype)
        divisors = {"value": self.value, "mask": {}}.get(kind, self.gradient)
        for axis, counts in divisors.items():
            n = counts[part] if counts.ndim == 2 else counts
            x = x / _along(n**2 if kind == "square" else n, axis).astype(x.dtype)
        return x


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    """[n] as an array that broadcasts along ``axis``, counted from the right."""
    return np.asarray(values).reshape(-1, *(1,) * (-axis - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """``fills``: {path: its new value} of tensors started afresh; ``removed``: paths that are gone; ``moved``: {new
    path: Origin}, after which an old path is gone unless it is named again; ``born``: the fills that are new tensors.
    ``exact``: whether the model computes the same function as before. ``by``: the method, filled in by the core.
    """

    fills: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    moved: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    born: frozenset[str] = frozenset()
    exact: bool = True
    by: str = ""

    @property
    def sources(self) -> frozenset[str]:
        """Old paths that moved."""
        return frozenset(path for origin in self.moved.values() for path, _ in origin.parts)

    def apply(self, tree: Any, kind: str) -> Any:
        """The pytree with every dict entry whose key is an edited path carried as ``kind`` says.

        Leaves with leading axes of their own (anchors of several tasks) are carried along them. A stack that a
        memory knows only in part is left out.
        """
        assert kind in KINDS, kind
        if not isinstance(tree, Mapping):
            return tree
        out, sources = {}, self.sources
        for key, value in tree.items():
            if key in self.removed or key in sources:
                continue
            out[key] = self._fill(key, value, kind) if key in self.fills else self.apply(value, kind)
        if sources & tree.keys():
            for path, origin in self.moved.items():
                if all(old in tree for old, _ in origin.parts):
                    out[path] = origin.build(tree, kind)
        return out

    def _fill(self, path: str, old: Any, kind: str) -> Any:
        if kind == "value":
            return jnp.broadcast_to(self.fills[path].astype(old.dtype), old.shape)
        return jnp.zeros_like(old)

    def sites(self, names: list[str]) -> list[str]:
        """Dense sites under their new names; a copied site is two."""
        gone = {path.rpartition("/")[0] for path in self.sources}
        moved = {new.rpartition("/")[0]: o.parts[0][0].rpartition("/")[0] for new, o in self.moved.items()}
        return sorted({n for n in names if n not in gone} | {new for new, old in moved.items() if old in names})

    def owners(self, owner: Mapping[str, str], surgeon: str) -> dict[str, str]:
        """{path: method}: what moves keeps its owner, what is born is the surgeon's."""
        kept = {k: v for k, v in owner.items() if k not in self.sources and k not in self.removed}
        moved = {new: o.parts[0][0] for new, o in self.moved.items()}
        followed = {new: owner[old] for new, old in moved.items() if old in owner}
        return kept | followed | dict.fromkeys(self.born, surgeon)


def restart(world: World, fills: Mapping[str, jax.Array]) -> World:
    """The world with tensors started afresh at new values, and the Edit noted for all memories."""
    params = dict(world.params) | dict(fills)
    return world._replace(params=params, edits=(*world.edits, Edit(dict(fills))))


def operated(world: World, spec: Any, edit: Edit) -> World:
    """The world after a surgery: another spec, the parameters moved and filled as the Edit says."""
    params = edit.apply(dict(world.params), "value") | dict(edit.fills)
    return world._replace(spec=spec, params=dict(sorted(params.items())), edits=(*world.edits, edit))


def carry(own: Mapping[str, Any], kinds: Mapping[str, str], edits: tuple[Edit, ...]) -> dict[str, Any]:
    """A method's memory taken through the edits; ``kinds``: {top-level name: kind}, ``sites`` for a list of sites."""
    out = {part: dict(memory) if isinstance(memory, Mapping) else memory for part, memory in own.items()}
    for part in ("fixed", "live", "host"):
        for name, kind in kinds.items():
            if isinstance(out.get(part), dict) and name in out[part]:
                for edit in edits:
                    follow = edit.sites if kind == "sites" else lambda x, e=edit, k=kind: e.apply(x, k)
                    out[part][name] = follow(out[part][name])
    return out


def complete(own: Mapping[str, Any], fresh: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """A memory whose tables also have the paths, and the tables, that only ``fresh``, a memory made now, has: those of
    new tensors."""
    out = {part: dict(memory) for part, memory in own.items()}
    for part in ("fixed", "live"):
        for name in kinds.keys() & fresh[part].keys():
            out[part][name] = {**fresh[part][name], **out[part].get(name, {})}
    return out


def restarted(moments: Mapping[str, jax.Array], edits: tuple[Edit, ...]) -> dict[str, jax.Array]:
    """An optimizer's flat state with the moments of tensors that were started afresh at zero; empty, so that the
    optimizer starts afresh, where tensors moved or were born.

    Keys end in a parameter path, its slashes written ``%2F`` (see `jaxcl.core.journal.flatten`).
    """
    if any(edit.moved or edit.born for edit in edits):
        return {}
    fresh = {path.replace("%", "%25").replace("/", "%2F") for edit in edits for path in edit.fills}
    return {k: jnp.zeros_like(v) if k.rsplit("/", 1)[-1] in fresh else v for k, v in moments.items()}
