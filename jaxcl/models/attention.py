"""Softmax attention of grouped queries over the keys of several parts, its backward pass written out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

PerPart = list[jax.Array | None]
LOWEST = float(jnp.finfo(jnp.float32).min)


BLOCKS, LONG = 4, 512


class Part(NamedTuple):
    """Keys and values [B,S,G,D] and who may see them, bool [B,T,S]. bias: f32[B or 1,H,T,S] that is added to the
    scores, or None. causal: the keys are the queries' own positions, and none sees a later one. kept: f32[B,H,T,S] that
    the weights are multiplied with (dropout), or None."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    bias: jax.Array | None = None
    causal: bool = False
    kept: jax.Array | None = None

    def of(self, first: int, last: int) -> Part:
        """The part as queries first..last see it: without the keys that come after all of them."""
        keys = last if self.causal else self.k.shape[1]
        bias, kept = (None if x is None else x[:, :, first:last, :keys] for x in (self.bias, self.kept))
        return Part(self.k[:, :keys], self.v[:, :keys], self.mask[:, first:last, :keys], bias, kept=kept)


def attend(q: jax.Array, parts: list[Part], scale: float | None = None) -> jax.Array:
    """Softmax attention of q [B,T,H,D] over the keys of all parts at once -> [B,T,H,D], see `whole`. A long causal part
    is cut into four blocks of queries, which leaves out three eighths of its scores: those that none may see."""
    t = q.shape[1]
    if t < LONG or not any(part.causal for part in parts):
        return whole(q, parts, scale)
    width = -(-t // BLOCKS)
    cuts = [(first, min(first + width, t)) for first in range(0, t, width)]
    return jnp.concatenate([whole(q[:, a:b], [part.of(a, b) for part in parts], scale) for a, b in cuts], axis=1)


def whole(q: jax.Array, parts: list[Part], scale: float | None = None) -> jax.Array:
    """Attention of q [B,T,H,D] over whole parts -> [B,T,H,D]; H is a multiple of G.

    Scores are times ``scale``, D ** -0.5 where it is None. The softmax is float32 and runs over the parts together: a
    cache is never copied to stand beside the block. The queries that share a key head are rows of one product.
    """
    b, t, h, d = q.shape
    groups = parts[0].k.shape[2]
    q = (q * (d**-0.5 if scale is None else scale)).reshape(b, t, groups, h // groups, d)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, d)
    by_group = lambda x: None if x is None else x.reshape(-1, groups, h // groups * t, x.shape[-1])  # noqa: E731
    biases, kept = [by_group(p.bias) for p in parts], [by_group(p.kept) for p in parts]
    ks, vs = ([x.swapaxes(1, 2).astype(q.dtype) for x in side] for side in zip(*((p.k, p.v) for p in parts)))
    out = mixed(rows, ks, vs, [p.mask for p in parts], biases, kept)
    return out.reshape(b, groups, h // groups, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def dots(left: jax.Array, right: jax.Array, axes: tuple[int, int], dtype: jnp.dtype | None = None) -> jax.Array:
    """Products of [B,G,..] with [B,G,..], contracting one axis of each."""
    dims = (((axes[0],), (axes[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


def seen(scores: jax.Array, mask: jax.Array, hidden: float) -> jax.Array:
    """scores [B,G,R,S] where the mask bool [B,T,S] lets a query see a key, ``hidden`` elsewhere."""
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, hidden).reshape(scores.shape)


def probabilities(q: jax.Array, ks: list[jax.Array], masks: list[jax.Array], biases: PerPart) -> list[jax.Array]:
    """f32[B,G,R,S] a part, R = T times the queries of a group; a query that sees nothing spreads evenly."""
    raw = [dots(q, k, (3, 3), jnp.float32) for k in ks]
    raw = [s if bias is None else s + bias for s, bias in zip(raw, biases)]
    scores = [seen(s, mask, LOWEST) for s, mask in zip(raw, masks)]
    top = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    raised = [jnp.exp(s - top) for s in scores]
    total = sum(jnp.sum(e, axis=-1, keepdims=True) for e in raised)
    return [e / total for e in raised]


def times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    return x if factor is None else x * factor.astype(x.dtype)


@jax.custom_vjp
def mixed(
    q: jax.Array, ks: list[jax.Array], vs: list[jax.Array], masks: list[jax.Array], biases: PerPart, kept: PerPart
) -> jax.Array:
    """q [B,G,R,D] over ks, vs [B,G,S,D] under masks bool [B,T,S] -> [B,G,R,D]; biases f32[B or 1,G,R,S] or None, the
    weights times ``kept`` f32[B,G,R,S] or None, a constant."""
    return _mixed(q, ks, vs, masks, biases, kept)[0]


def _mixed(
    q: jax.Array, ks: list[jax.Array], vs: list[jax.Array], masks: list[jax.Array], biases: PerPart, kept: PerPart
) -> tuple:
    probs = [p.astype(q.dtype) for p in probabilities(q, ks, masks, biases)]
    out = sum(dots(times(p, f), v, (3, 2)) for p, v, f in zip(probs, vs, kept))
    return out, (q, ks, vs, masks, probs, biases, kept)


def _mixed_back(saved: tuple, g: jax.Array) -> tuple:
    """d score = p (dp - sum over all parts of p dp), where the query sees the key. A bias without rows of its own
    gets the sum over all of them."""
    q, ks, vs, masks, probs, biases, factors = saved
    dprobs = [times(dots(g, v, (3, 3), jnp.float32), f) for v, f in zip(vs, factors)]
    mean = sum(jnp.sum(p * dp, axis=-1, keepdims=True) for p, dp in zip(probs, dprobs))
    wide = [seen(p * (dp - mean), m, 0.0) for p, dp, m in zip(probs, dprobs, masks)]
    dbiases = [None if b is None else d if len(b) == len(d) else d.sum(0, keepdims=True) for b, d in zip(biases, wide)]
    dscores = [d.astype(q.dtype) for d in wide]
    dq = sum(dots(ds, k, (3, 2)) for ds, k in zip(dscores, ks))
    dks = [dots(ds, q, (2, 2)) for ds in dscores]
    dvs = [dots(times(p, f), g, (2, 2)) for p, f in zip(probs, factors)]
    dkept = [None if f is None else jnp.zeros_like(f) for f in factors]
    return dq, dks, dvs, [None] * len(ks), dbiases, dkept


mixed.defvjp(_mixed, _mixed_back)
