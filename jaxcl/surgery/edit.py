"""A surgery's Edit: what it did to parameters, so that every memory that mirrors them can follow.

A memory is carried by its kind: a ``value`` (an anchor, a teacher) becomes the new value, a ``gradient`` (a
momentum) and a ``square`` (a Fisher, a second moment) become zero, a ``mask`` becomes false. Without this, EWC would
anchor O-LoRA's fresh adapter to the one that just moved into the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import World

KINDS = ("value", "gradient", "square", "mask")


@dataclasses.dataclass(frozen=True)
class Edit:
    """``fills``: {path: its new value} of tensors started afresh; ``removed``: paths that are gone."""

    fills: Mapping[str, jax.Array]
    removed: frozenset[str] = frozenset()

    def apply(self, tree: Any, kind: str) -> Any:
        """The pytree with every dict entry whose key is an edited path carried as ``kind`` says.

        Leaves with leading axes of their own (anchors of several tasks) are filled along them.
        """
        assert kind in KINDS, kind
        if not isinstance(tree, Mapping):
            return tree
        out = {}
        for key, value in tree.items():
            if key in self.removed:
                continue
            out[key] = self._fill(key, value, kind) if key in self.fills else self.apply(value, kind)
        return out

    def _fill(self, path: str, old: Any, kind: str) -> Any:
        if kind == "value":
            return jnp.broadcast_to(self.fills[path].astype(old.dtype), old.shape)
        return jnp.zeros_like(old)


def restart(world: World, fills: Mapping[str, jax.Array]) -> World:
    """The world with tensors started afresh at new values, and the Edit noted for all memories."""
    params = dict(world.params) | dict(fills)
    return world._replace(params=params, edits=(*world.edits, Edit(dict(fills))))


def carry(own: Mapping[str, Any], kinds: Mapping[str, str], edits: tuple[Edit, ...]) -> dict[str, Any]:
    """A method's memory taken through the edits; ``kinds``: {top-level name: kind}."""
    out = {part: dict(memory) if isinstance(memory, Mapping) else memory for part, memory in own.items()}
    for part in ("fixed", "live"):
        for name, kind in kinds.items():
            if isinstance(out.get(part), dict) and name in out[part]:
                for edit in edits:
                    out[part][name] = edit.apply(out[part][name], kind)
    return out


def restarted(moments: Mapping[str, jax.Array], edits: tuple[Edit, ...]) -> dict[str, jax.Array]:
    """An optimizer's flat state with the moments of tensors that were started afresh at zero.

    Keys end in a parameter path, its slashes written ``%2F`` (see `jaxcl.core.journal.flatten`).
    """
    fresh = {path.replace("%", "%25").replace("/", "%2F") for edit in edits for path in edit.fills}
    return {k: jnp.zeros_like(v) if k.rsplit("/", 1)[-1] in fresh else v for k, v in moments.items()}
