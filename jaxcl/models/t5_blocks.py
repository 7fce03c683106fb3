"""T5's layers as Flax NNX modules over the flat dict; dense sites, norms and gates are the decoder's.

Shapes: B rows, T tokens, S cache slots, M source tokens, D width, H heads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Part, attend
from .blocks import ACTIVATIONS, Dense, GatedMLP, RMSNorm, View, below
from .bottleneck import Bottleneck
from .cache import Cache, Written, write
from .flow import CacheFlow, SiteFlow
from .prefix import Prefix
from .t5_spec import T5Spec


@dataclasses.dataclass(kw_only=True)
class T5Flow(CacheFlow):
    """What the layers of a stack need beside their input. bias: f32[B or 1,H,T,T] of relative positions inside the
    block, past_bias f32[B,H,T,S] to the cache's slots, or None. source: [B,M,D], what the encoder made; None in the
    encoder itself and where a cache holds its keys and values. reads: bool [B,T,M], who sees which of it, None in the
    encoder.
    """

    bias: jax.Array
    past_bias: jax.Array | None = None
    source: jax.Array | None = None
    reads: jax.Array | None = None


class T5Attention(nnx.Module):
    """Attention whose scores are not scaled: the initial weights of q are (Raffel et al. 2020)."""

    def __init__(self, view: View, site: str, head_dim: int):
        self.site, self.head_dim = site, head_dim
        self.q, self.k, self.v, self.o = (Dense(below(view, n), f"{site}/{n}") for n in "qkvo")
        self.prefix = Prefix(view)

    def keys(self, x: jax.Array, flow: T5Flow) -> Written:
        """Keys and values [B,T,H,Dh] of x [B,T,D]."""
        return Written(self.heads(self.k(x, flow)), self.heads(self.v(x, flow)))

    def __call__(self, x: jax.Array, parts: list[Part], flow: T5Flow) -> jax.Array:
        q = self.heads(self.q(x, flow))
        parts = [*parts, *self.prefix.parts(flow, q)]
        y = attend(q, [self.thinned(i, part, flow) for i, part in enumerate(parts)], 1.0)
        return self.o(y.reshape(*x.shape[:-1], -1), flow)

    def thinned(self, number: int, part: Part, flow: T5Flow) -> Part:
        """The part with dropout on its attention weights."""
        if flow.key is None or flow.own_rate == 0.0:
            return part
        (b, t, s), heads = part.mask.shape, part.k.shape[2]
        ones = jnp.ones((b, heads, t, s), jnp.float32)
        return part._replace(kept=flow.own(f"{self.site}/weights/{number}", ones))

    def heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], -1, self.head_dim)


class ReluMLP(nnx.Module):
    """down(relu(up(x)))."""

    def __init__(self, view: View):
        self.up, self.down = (Dense(below(view, n), f"mlp/{n}") for n in ("up", "down"))

    def __call__(self, x: jax.Array, flow: SiteFlow) -> jax.Array:
        return self.down(flow.own("mlp/down:in", ACTIVATIONS["relu"](self.up(x, flow))), flow)


class T5Block(nnx.Module):
    """x + attention, in the decoder + attention to the source, + feed-forward, each of the normed x. Bottlenecks stand
    behind attention and feed-forward, before the model's own dropout."""

    def __init__(self, view: View, spec: T5Spec, crossed: bool):
        norms = ("attn_norm", "mlp_norm")
        self.attn_norm, self.mlp_norm = (RMSNorm(below(view, n), spec.norm_eps) for n in norms)
        self.attn = T5Attention(below(view, "attn"), "attn", spec.head_dim)
        self.cross = Cross(below(view, "cross"), spec) if crossed else None
        self.mlp = GatedMLP(below(view, "mlp"), "gelu_tanh") if spec.gated else ReluMLP(below(view, "mlp"))
        self.attn_adapter, self.mlp_adapter = (Bottleneck(below(view, n)) for n in ("attn", "mlp"))

    def __call__(self, x: jax.Array, flow: T5Flow, old: Cache) -> tuple[jax.Array, Cache]:
        """(x after the layer, the cache entries that it writes); old: its entries so far."""
        normed = self.attn_norm(x)
        new = self.attn.keys(normed, flow)
        parts = [Part(*new, flow.block, flow.bias, causal=self.cross is not None)]
        cached = Written(old["k"], old["v"]) if "k" in old else None
        if cached is not None and flow.past is not None:
            parts.append(Part(*cached, flow.past, flow.past_bias))
        x = x + flow.own("attn", self.attn_adapter(normed, self.attn(normed, parts, flow)))
        written = write(flow, cached, new)
        entries: Cache = {} if written is None else {"k": written.k, "v": written.v}
        if self.cross is not None:
            y, kept = self.cross(x, flow, below(old, "cross"))
            x, entries = x + y, entries | {f"cross/{name}": leaf for name, leaf in kept.items()}
        normed = self.mlp_norm(x)
        x = x + flow.own("mlp", self.mlp_adapter(normed, self.mlp(normed, flow)))
        flow.see("out", x)
        return x, entries


class Cross(nnx.Module):
    """The decoder's attention to the source, whose keys and values are computed once and then kept."""

    def __init__(self, view: View, spec: T5Spec):
        self.norm = RMSNorm(below(view, "attn_norm"), spec.norm_eps)
        self.attn = T5Attention(below(view, "attn"), "cross/attn", spec.head_dim)

    def __call__(self, x: jax.Array, flow: T5Flow, old: Cache) -> tuple[jax.Array, Cache]:
        """(what the source adds to x, the entries for the cache where there is one)."""
        assert flow.reads is not None
        if flow.source is None:
            keys = Written(old["k"], old["v"])
        else:
            keys = self.attn.keys(flow.source, dataclasses.replace(flow, real=jnp.any(flow.reads, axis=1)))
        y = flow.own("cross/attn", self.attn(self.norm(x), [Part(*keys, flow.reads)], flow))
        return y, {"k": keys.k, "v": keys.v} if flow.mode == "fill" else {}
