"""A wider decoder that computes the same function: units are copied, and what reads a copied unit divides by how many
there are. Source: ELLE (Qin et al. 2022, section 3.2), after Net2Net (Chen et al. 2016).

Attention grows by whole groups (a key-value head with its query heads), whose size never changes. Copies of the
residual stream change what an RMSNorm measures unless every unit has as many copies: then growth is exact, as it is
where only heads and MLP units grow; else it is approximate, and the Edit says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.paths import concrete, is_stacked
from jaxcl.core.types import Params, World
from jaxcl.errors import RequestError
from jaxcl.models.layout import axes, layout, plain
from jaxcl.models.spec import DecoderSpec
from jaxcl.surgery.edit import Edit, Origin, operated

READS = {"kernel": -2, "lora_a": -1, "bank_a": -1, "mlp_in": -2, "adapter_down": -2, "parallel_down": -2,
         "general": -2, "specific": -2}  # fmt: skip
"""The axis of a tensor that reads units; all its other named axes write them."""

HEADS = ("value_head/kernel", "idbr/general", "idbr/specific")
"""What methods put on the last hidden state, as a language model's head stands there."""

SHARED = (
    *("/lora_scale", "/bank_scale", "parallel_scale", "vocab_bias", "value_head/bias", "prefix/rows", "prefix/in"),
    *("/mlp_in_bias", "prefix/in_bias", "adapter_down_bias", "parallel_down_bias"),
    *("/expert_scale", "/expert_bias", "/expert_bias_old"),
    *("idbr/general_bias", "idbr/specific_bias", "idbr/task", "idbr/task_bias", "idbr/order", "idbr/order_bias"),
)
"""Keys beside those of the layout whose entries are no units."""


class Sizes(NamedTuple):
    """What a decoder may grow in. groups: key-value heads."""

    width: int
    groups: int
    mlp: int


def sizes(spec: DecoderSpec) -> Sizes:
    """Those of a spec."""
    return Sizes(spec.width, spec.kv_heads, spec.mlp)


def copies(old: int, new: int, rng: np.random.Generator | None) -> np.ndarray:
    """c: i64[new], the unit that every unit is a copy of: itself for the old ones, drawn for the others; in turn where
    ``rng`` is None, which is exact when ``new`` is a multiple of ``old``."""
    extra = np.arange(old, new) % old if rng is None else rng.integers(0, old, new - old)
    return np.concatenate([np.arange(old), extra])


def widen(world: World, to: Sizes, *, even: bool = False, seed: int = 0) -> World:
    """The world with ``to`` sizes. even: units are copied in turn instead of at random (drawn by ``seed``; one draw for
    the residual stream, one per layer for its groups and one for its MLP units).

    Values divide where they read copied units, gradients where they write them. With tied embeddings the last norm's
    scale divides, once. Raises RequestError for sizes below the present ones, another model than a decoder, and a
    parameter whose axes are not known.
    """
    spec = world.spec
    if not isinstance(spec, DecoderSpec):
        raise RequestError(f"a {type(spec).__name__} cannot be widened; accepted: a DecoderSpec")
    for name, now, then in zip(Sizes._fields, sizes(spec), to, strict=True):
        if then < now:
            raise RequestError(f"{name} {then} is below the present {now}; accepted: {now} or more")
    maps = _Maps(spec, to, even, seed)
    named, known = axes(spec, world.params), layout(spec)
    for path, x in world.params.items():
        shared = path.removesuffix("_bank").endswith(SHARED)
        if x.ndim and not any(named[path]) and plain(path) not in known and not shared:
            shape = list(x.shape)
            raise RequestError(f"{path!r} {shape} cannot be widened: which of its axes are units is not known")
    moved = {path: _origin(path, x, named[path], maps, spec.tied) for path, x in world.params.items()}
    moved = {path: origin for path, origin in moved.items() if origin.index}
    wider = dataclasses.replace(
        spec, width=to.width, kv_heads=to.groups, heads=to.groups * (spec.heads // spec.kv_heads), mlp=to.mlp
    )
    return operated(world, wider, Edit(moved=moved, exact=maps.exact(spec)))


def noisy(params: Params, edit: Edit, key: jax.Array, std: float) -> Params:
    """``params`` with N(0, std^2) added to the entries that an Edit copied, so that copies do not stay equal."""
    out = dict(params)
    for n, (path, origin) in enumerate(sorted(edit.moved.items())):
        x = params[path]
        new = np.full((1,) * x.ndim, origin.fresh)
        for axis, index in origin.index.items():
            later = np.arange(index.shape[-1]) > np.max(index)
            new = new | later.reshape(-1, *(1,) * (-axis - 1))
        noise = std * jax.random.normal(jax.random.fold_in(key, n), x.shape, jnp.float32)
        out[path] = (x + jnp.where(new, noise, 0.0)).astype(x.dtype)
    return out


class _Maps:
    """{logical axis: index map} of a layer, or of what stands outside the layers (layer -1)."""

    def __init__(self, spec: DecoderSpec, to: Sizes, even: bool, seed: int):
        draw = lambda *at: None if even else np.random.default_rng([seed, *at])  # noqa: E731
        now = sizes(spec)
        self.residual = copies(now.width, to.width, draw(0))
        self.groups = [copies(now.groups, to.groups, draw(1, i)) for i in range(spec.layers)]
        self.mlp = [copies(now.mlp, to.mlp, draw(2, i)) for i in range(spec.layers)]
        self.wide = {"kv": spec.head_dim, "heads": spec.head_dim * (spec.heads // spec.kv_heads)}
        self.now, self.to = now, to

    def of(self, axis: str | None, layer: int) -> np.ndarray | None:
        """The map of an axis, None where it does not grow."""
        if axis == "embed" and self.to.width > self.now.width:
            return self.residual
        if axis == "mlp" and self.to.mlp > self.now.mlp:
            return self.mlp[layer]
        if axis in self.wide and self.to.groups > self.now.groups:
            n = self.wide[axis]
            return (self.groups[layer][:, None] * n + np.arange(n)).reshape(-1)
        return None

    def exact(self, spec: DecoderSpec) -> bool:
        """Whether every norm over a grown axis still measures the same."""
        over = [self.residual, *(self.groups if spec.qk_norm == "width" else ())]
        return all(len(set(np.bincount(c).tolist())) == 1 for c in over)


def _origin(path: str, x: Any, named: tuple[str | None, ...], maps: _Maps, tied: bool) -> Origin:
    stacked = is_stacked(path)
    rank = x.ndim - stacked
    name = path.rpartition("/")[2].removesuffix("_bank")
    layers = [int(p.split("/")[1]) if p.startswith("layers/") else -1 for p in concrete(path)]
    undivided = path == "embed/kernel" or (tied and path in HEADS)  # the last norm did that for them
    reads = None if undivided else READS.get(name)
    index: dict[int, np.ndarray] = {}
    value: dict[int, np.ndarray] = {}
    gradient: dict[int, np.ndarray] = {}
    for axis in range(-rank, 0):
        found = [c for layer in layers if (c := maps.of(named[axis], layer)) is not None]
        if not found:
            continue
        counts = [np.bincount(c)[c].astype(np.float32) for c in found]
        index[axis], n = _stack(found, stacked), _stack(counts, stacked)
        last = tied and path.startswith("final_norm/")  # its copies are read by the embedding, which cannot divide
        (value if axis == reads or last else gradient)[axis] = n
    parts = tuple((path, i if stacked else None) for i in range(len(layers)))
    return Origin(parts, rank, stacked=stacked, index=index, value=value, gradient=gradient)


def _stack(arrays: list[Any], stacked: bool) -> np.ndarray:
    return np.stack(arrays) if stacked else arrays[0]

