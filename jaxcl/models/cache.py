"""The key-value cache: a flat dict of arrays, and the two ways to call a model with one.

``{'layers/0/k': [B,S,Hkv,Dh], 'layers/0/v': ..., 'valid': bool[B,S]}``, with repeats in front where layers
are stacked; slot = position of the token. Other entries (``'router/...'``) belong to whoever wrapped
`apply` and pass through untouched. The structure says, statically, what a call does:

- no ``/k`` entries yet: fill. The block attends to itself only and its keys make the cache (`prefill`).
- a ``'read_only'`` entry (it is None, so it holds no array): nothing is written (`extend` with write=False).
- else: the block attends to the cache and itself, then its tokens of segment 1 are written.

A block sees the valid slots *before its own first position*, so the last prompt token may be fed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.types import Apply, Batch, Outputs, Params
from .flow import CacheFlow

Cache = dict[str, Any]


class Written(NamedTuple):
    """Keys and values of one layer [B,S,Hkv,Dh]."""

    k: jax.Array
    v: jax.Array


def prefill(apply: Apply, spec: Any, params: Params, batch: Batch, size: int) -> Outputs:
    """Runs the prompts and makes a cache with ``size`` slots.

    batch: tokens, segments (1 for the prompt, 0 for padding on the right), positions, all i32[B,T], and
    what else ``apply`` reads. Tokens at positions >= size are not kept. Returns Outputs with ``.cache``; its
    nll is None unless the batch has ``targets_at``.
    """
    return apply(spec, params, batch, cache={"valid": jnp.zeros((batch["tokens"].shape[0], size), bool)})


def extend(apply: Apply, spec: Any, params: Params, batch: Batch, cache: Cache, write: bool) -> Outputs:
    """Runs a block of tokens after what the cache holds.

    Every token sees the valid slots before the block's first position and, inside the block, the earlier
    tokens of its own segment. write: tokens of segment 1 go to the slot of their position (static).

    Decoding: one token a row, segment 1 (0 once the row is done), position = length so far, write=True.

    Ranking L labels of up to M-1 tokens after prompts of length n: block [B, L*M] in which label l has
    segment l+1 (0 in its padding), starts with the prompt's last token again and has positions n-1, n, ...;
    ``targets_at`` gives the indices of the labels' own tokens in the block, write=False. The nll is then that
    of prompt and label run whole.
    """
    out = apply(spec, params, batch, cache=cache if write else {**cache, "read_only": None})
    return out._replace(cache={name: leaf for name, leaf in out.cache.items() if name != "read_only"})


def spread(cache: Cache, rows: int) -> Cache:
    """The cache of a single row, for ``rows`` rows that all begin with its prompt. Only for what the model keeps: a
    router's entries are decisions about one prompt."""

    def wide(name: str, leaf: jax.Array) -> jax.Array:
        axis = leaf.ndim - (2 if name == "valid" else 4)  # where layers are stacked, repeats are in front
        return jnp.broadcast_to(leaf, (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :]))

    return {name: wide(name, leaf) for name, leaf in cache.items()}


def route(cache: Cache | None, batch: Batch) -> dict[str, Any]:
    """The parts of a `Flow` that follow from a cache: mode, size, slots, past."""
    if cache is None:
        return {}
    segments, positions, valid = batch["segments"], batch["positions"], cache["valid"]
    size = valid.shape[1]
    slots = jnp.where(segments == 1, positions, size)
    if not any(name.endswith("/k") for name in cache):
        return {"mode": "fill", "size": size, "slots": slots}
    first = jnp.min(jnp.where(segments > 0, positions, size), axis=1)
    seen = valid & (jnp.arange(size) < first[:, None])
    past = seen[:, None, :] & (segments > 0)[:, :, None]
    return {"mode": "read" if "read_only" in cache else "write", "size": size, "slots": slots, "past": past}


def write(flow: CacheFlow, old: Written | None, new: Written) -> Written | None:
    """One layer's keys and values with the block's written at their slots; None where nothing is kept."""
    if flow.mode not in ("fill", "write"):
        return None
    b, _, heads, dim = new.k.shape
    rows = jnp.arange(b)[:, None]
    if old is None:
        empty = jnp.zeros((b, flow.size, heads, dim), new.k.dtype)
        old = Written(empty, empty)
    return Written(*(o.at[rows, flow.slots].set(n.astype(o.dtype), mode="drop") for o, n in zip(old, new)))


def closed(cache: Cache | None, flow: CacheFlow, written: Cache) -> Cache | None:
    """The cache after all layers: new keys, and the slots that now hold something."""
    if cache is None or flow.mode == "read":
        return cache
    rows = jnp.arange(cache["valid"].shape[0])[:, None]
    return {**cache, **written, "valid": cache["valid"].at[rows, flow.slots].set(True, mode="drop")}
