"""Softmax attention of grouped queries over the keys of several parts, its backward pass written out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Biases = list[jax.Array | None]
LOWEST = float(jnp.finfo(jnp.float32).min)


class Part(NamedTuple):
    """Keys and values [B,S,G,D] and who may see them, bool [B,T,S]. bias: f32[B or 1,H,T,S] that is added to the
    scores, or None."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    bias: jax.Array | None = None


def attend(q: jax.Array, parts: list[Part], scale: float | None = None) -> jax.Array:
    """Softmax attention of q [B,T,H,D] over the keys of all parts at once -> [B,T,H,D]; H is a multiple of G.

    Scores are times ``scale``, D ** -0.5 where it is None. The softmax is float32 and runs over the parts together: a
    cache is never copied to stand beside the block. The queries that share a key head are rows of one product.
    """
    b, t, h, d = q.shape
    groups = parts[0].k.shape[2]
    q = (q * (d**-0.5 if scale is None else scale)).reshape(b, t, groups, h // groups, d)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, d)
    biases = [None if p.bias is None else p.bias.reshape(-1, groups, h // groups * t, p.bias.shape[-1]) for p in parts]
    ks, vs = ([x.swapaxes(1, 2).astype(q.dtype) for x in side] for side in zip(*((p.k, p.v) for p in parts)))
    out = mixed(rows, ks, vs, [p.mask for p in parts], biases)
    return out.reshape(b, groups, h // groups, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def dots(left: jax.Array, right: jax.Array, axes: tuple[int, int], dtype: jnp.dtype | None = None) -> jax.Array:
    """Products of [B,G,..] with [B,G,..], contracting one axis of each."""
    dims = (((axes[0],), (axes[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


def seen(scores: jax.Array, mask: jax.Array, hidden: float) -> jax.Array:
    """scores [B,G,R,S] where the mask bool [B,T,S] lets a query see a key, ``hidden`` elsewhere."""
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, hidden).reshape(scores.shape)


def probabilities(q: jax.Array, ks: list[jax.Array], masks: list[jax.Array], biases: Biases) -> list[jax.Array]:
    """f32[B,G,R,S] a part, R = T times the queries of a group; a query that sees nothing spreads evenly."""
    raw = [dots(q, k, (3, 3), jnp.float32) for k in ks]
    raw = [s if bias is None else s + bias for s, bias in zip(raw, biases)]
    scores = [seen(s, mask, LOWEST) for s, mask in zip(raw, masks)]
    top = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    raised = [jnp.exp(s - top) for s in scores]
    total = sum(jnp.sum(e, axis=-1, keepdims=True) for e in raised)
    return [e / total for e in raised]


@jax.custom_vjp
def mixed(
    q: jax.Array, ks: list[jax.Array], vs: list[jax.Array], masks: list[jax.Array], biases: Biases
) -> jax.Array:
    """q [B,G,R,D] over ks, vs [B,G,S,D] under masks bool [B,T,S], biases f32[B or 1,G,R,S] or None -> [B,G,R,D]."""
    return _mixed(q, ks, vs, masks, biases)[0]


def _mixed(
    q: jax.Array, ks: list[jax.Array], vs: list[jax.Array], masks: list[jax.Array], biases: Biases
) -> tuple:
    probs = [p.astype(q.dtype) for p in probabilities(q, ks, masks, biases)]
    out = sum(dots(p, v, (3, 2)) for p, v in zip(probs, vs))
    return out, (q, ks, vs, masks, probs, biases)


def _mixed_back(kept: tuple, g: jax.Array) -> tuple:
    """d score = p (dp - sum over all parts of p dp), where the query sees the key. A bias without rows of its own
    gets the sum over all of them."""
    q, ks, vs, masks, probs, biases = kept
    dprobs = [dots(g, v, (3, 3), jnp.float32) for v in vs]
    mean = sum(jnp.sum(p * dp, axis=-1, keepdims=True) for p, dp in zip(probs, dprobs))
    wide = [seen(p * (dp - mean), m, 0.0) for p, dp, m in zip(probs, dprobs, masks)]
    dbiases = [None if b is None else d if len(b) == len(d) else d.sum(0, keepdims=True) for b, d in zip(biases, wide)]
    dscores = [d.astype(q.dtype) for d in wide]
    dq = sum(dots(ds, k, (3, 2)) for ds, k in zip(dscores, ks))
    return dq, [dots(ds, q, (2, 2)) for ds in dscores], [dots(p, g, (2, 2)) for p in probs], [None] * len(ks), dbiases


mixed.defvjp(_mixed, _mixed_back)
