"""Prefixes: learned keys and values that every layer's attention has beside its tokens' own (Li and Liang 2021).

``attn/prefix_k``, ``attn/prefix_v`` f32[p, G*Dh], or [B, p, G*Dh], each row its own, which every token of a row sees;
with ``attn/prefix_open`` bool[B], in the rows where it is true. They are no positions: the keys are stored as attention
reads them, normed and turned, so the tokens' positions stay as they are, windows do not hide a prefix, it does not
count against the context, and a cache never holds it. (A prefix made of real tokens has their keys at positions
-p .. -1.) A T5 has one in every attention of its encoder, of its decoder, and of the decoder to the source; no relative
bias falls on it.

Where they are trained through a network, ``prefix/rows`` [p, W], ``prefix/in`` [W, N] with ``prefix/in_bias`` make a
hidden layer tanh(..), shared, and each layer's ``attn/prefix_map`` [N, 2, G*Dh] with ``attn/prefix_map_bias`` [2, G*Dh]
what is added to its keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Part
from .flow import CacheFlow

NAMES = ("prefix_k", "prefix_v")
NETWORK = ("prefix/rows", "prefix/in", "prefix/in_bias")
MAP = ("prefix_map", "prefix_map_bias")
OPEN = "prefix_open"


class Prefix(nnx.Module):
    """The prefix of one layer, if there is one."""

    prefix_k: nnx.Param
    prefix_v: nnx.Param
    prefix_map: nnx.Param
    prefix_map_bias: nnx.Param
    prefix_open: nnx.Param

    def __init__(self, view: Mapping[str, jax.Array]):
        for name in (*NAMES, *MAP, OPEN):
            if name in view:
                setattr(self, name, nnx.Param(view[name]))

    def parts(self, flow: CacheFlow, like: jax.Array) -> list[Part]:
        """What attention gets of it: a part or none, for as many rows, tokens and heads as ``like`` [B,T,G,Dh] has."""
        if not hasattr(self, "prefix_k") or not self.prefix_k[...].shape[-2]:
            return []
        b, t, g, d = like.shape
        k, v = (getattr(self, name)[...] for name in NAMES)
        if hasattr(self, "prefix_map") and flow.prefix is not None:
            more = added(flow.prefix, self.prefix_map[...], self.prefix_map_bias[...])
            k, v = k + more[0], v + more[1]
        p = k.shape[-2]
        k, v = (jnp.broadcast_to(x.reshape(*x.shape[:-1], g, d), (b, p, g, d)).astype(like.dtype) for x in (k, v))
        seen = self.prefix_open[...] if hasattr(self, OPEN) else jnp.ones(b, bool)
        return [Part(k, v, jnp.broadcast_to(seen[:, None, None], (b, t, p)))]


def network(params: Mapping[str, jax.Array]) -> jax.Array | None:
    """The hidden layer [p, N] of the prefixes' network, or None."""
    if "prefix/rows" not in params:
        return None
    return jnp.tanh(params["prefix/rows"] @ params["prefix/in"] + params["prefix/in_bias"])


def added(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[..., 2, p, G*Dh], what a layer's map makes of the hidden layer [p, N]; kernel [..., N, 2, G*Dh]."""
    return jnp.einsum("pm,...mcn->...cpn", hidden, kernel) + bias[..., None, :]


def materialised(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{path of a prefix: its keys or values, with what the network adds}; empty where there is none."""
    hidden = network(params)
    if hidden is None:
        return {}
    out: dict[str, jax.Array] = {}
    for path in [k for k in params if k.endswith("/prefix_map")]:
        site = path.removesuffix("/prefix_map")
        more = added(hidden, params[path], params[path + "_bias"])
        for at, name in enumerate(NAMES):
            out[f"{site}/{name}"] = params[f"{site}/{name}"] + more[..., at, :, :]
    return out
