"""The decoder's blocks as Flax NNX modules: views of the flat dict that live for the length of a trace.

A module takes the entries below its own path. The adapter keys of a dense site are optional; what is there
is used. Shapes: B rows, T tokens, S cache slots, D width, H heads, G queries per key head, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Part, attend
from .bottleneck import Bottleneck
from .cache import Written, write
from .experts import Experts
from .flow import Flow, SiteFlow
from .layout import FACTORS
from .prefix import Prefix
from .products import low_rank, product
from .rope import rotate
from .spec import DecoderSpec

View = Mapping[str, jax.Array]
Norm = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Norm] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
ADAPTERS = ("lora_a", "lora_b", "lora_scale", "bank_a", "bank_b", "bank_scale", *FACTORS)
DENSE_KEYS = ("kernel", "bias", *ADAPTERS)


def below(entries: View, prefix: str) -> dict[str, jax.Array]:
    """The entries under ``prefix/``, with the rest of their path as key."""
    start = prefix + "/"
    return {path[len(start) :]: leaf for path, leaf in entries.items() if path.startswith(start)}


class Dense(nnx.Module):
    """y = x W, plus a bias, a live adapter and a bank of frozen ones where their keys exist.

    kernel [in, out]; bias [out]; lora_a [r, in], lora_b [out, r], lora_scale []: y += scale (drop(x) a^T) b^T
    (Hu et al. 2021, eq. 3); bank_a [S, r, in], bank_b [S, out, r], bank_scale []: the same, summed over slots with
    the weights ``flow.bank`` [B, S]; in_scale [in], out_scale [out]: x and y times these, unit by unit; in_delta,
    out_delta: times 1 plus these (IA3). Any of the four may be [B, units], one for each row (HAT, IA3 by task).
    expert_*: see `jaxcl.models.experts`.
    """

    kernel: nnx.Param
    bias: nnx.Param
    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_scale: nnx.Param
    bank_a: nnx.Param
    bank_b: nnx.Param
    bank_scale: nnx.Param
    in_scale: nnx.Param
    out_scale: nnx.Param
    in_delta: nnx.Param
    out_delta: nnx.Param

    def __init__(self, view: View, site: str):
        self.site = site
        for name in DENSE_KEYS:
            if name in view:
                setattr(self, name, nnx.Param(view[name]))
        self.experts = Experts(view)

    def __call__(self, x: jax.Array, flow: SiteFlow) -> jax.Array:
        x = self.scaled(x, "in")
        flow.see(f"{self.site}:in", x)
        y = product(x, self.kernel[...].astype(x.dtype))
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(y.dtype)
        y = self.experts(x, self.adapted(x, y, flow), flow, self.site)
        return flow.through(self.site, x, self.scaled(y, "out"))

    def scaled(self, x: jax.Array, side: str) -> jax.Array:
        """x [B,T,units] times what the site's factors on this side, ``in`` or ``out``, say."""
        for name, base in ((f"{side}_scale", 0.0), (f"{side}_delta", 1.0)):
            if hasattr(self, name):
                factor = (base + getattr(self, name)[...]).astype(x.dtype)
                x = x * (factor if factor.ndim == 1 else factor[:, None])
        return x

    def adapted(self, x: jax.Array, y: jax.Array, flow: SiteFlow) -> jax.Array:
        """y plus what the adapters at this site make of x."""
        if not (hasattr(self, "lora_a") or hasattr(self, "bank_b")):
            return y
        x = flow.drop(self.site, x)
        if hasattr(self, "lora_a"):
            live = (self.lora_a, self.lora_b, self.lora_scale)
            y = y + low_rank(x, *(leaf[...].astype(x.dtype) for leaf in live))
        if hasattr(self, "bank_b"):  # of one that is folded into the kernel only ``bank_a`` is left, for penalties
            y = y + bank(x, self.bank_a[...], self.bank_b[...], self.bank_scale[...], flow.bank)
        return y


def bank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, weight: jax.Array | None) -> jax.Array:
    """sum_s w[B,s] scale (x a_s^T) b_s^T for x [B,T,in], a [S,r,in], b [S,out,r]; weight None means ones."""
    a, b, scale = (leaf.astype(x.dtype) for leaf in (a, b, scale))
    if weight is None:  # then the slots are one adapter of rank S r
        return low_rank(x, a.reshape(-1, a.shape[-1]), b.swapaxes(0, 1).reshape(b.shape[1], -1), scale)
    inner = jnp.einsum("bti,sri->btsr", x, a) * scale
    return jnp.einsum("btsr,sor->bto", inner * weight[:, None, :, None].astype(x.dtype), b)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 whatever x is (Zhang and Sennrich 2019). Gemma's own files hold
    scale - 1; ours hold the scale of every architecture. scale_delta [D], or [B,D] by row, is added to it."""

    scale_delta: nnx.Param

    def __init__(self, view: View, eps: float):
        self.scale = nnx.Param(view["scale"])
        if "scale_delta" in view:
            self.scale_delta = nnx.Param(view["scale_delta"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        if hasattr(self, "scale_delta"):
            scale = scale + self.scale_delta[...]
            scale = scale if scale.ndim == 1 else scale[:, None]  # of rows [B,T,D]; adapters are before heads are cut
        return (normed * scale).astype(x.dtype)


def norm(view: View, name: str, spec: DecoderSpec, built: bool) -> Norm:
    """The norm ``name`` of a view, or what changes nothing where the architecture has none there."""
    return RMSNorm(below(view, name), spec.norm_eps) if built else unchanged


def unchanged(x: jax.Array) -> jax.Array:
    return x


class Embedding(nnx.Module):
    """tokens i32[...] -> kernel rows [..., D] times ``scale``, which is rounded to the rows' type as transformers does
    it; a token outside the vocabulary gives NaN, not another's row."""

    def __init__(self, view: View):
        self.kernel = nnx.Param(view["kernel"])

    def __call__(self, tokens: jax.Array, dtype: str, scale: float = 1.0) -> jax.Array:
        rows = jnp.take(self.kernel[...], tokens, axis=0).astype(dtype)
        return rows if scale == 1.0 else rows * jnp.asarray(scale, dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; queries see old cache slots and their own block."""

    def __init__(self, view: View, spec: DecoderSpec):
        self.spec = spec
        self.q, self.k, self.v, self.o = (Dense(below(view, n), f"attn/{n}") for n in "qkvo")
        self.q_norm, self.k_norm = (norm(view, f"{n}_norm", spec, spec.qk_norm != "none") for n in "qk")
        self.prefix = Prefix(view)

    def __call__(self, x: jax.Array, flow: Flow, cached: Written | None) -> tuple[jax.Array, Written | None]:
        q = rotate(self.heads(self.q(x, flow), self.q_norm), flow.rope)
        k = rotate(self.heads(self.k(x, flow), self.k_norm), flow.rope)
        new = Written(k, self.heads(self.v(x, flow)))
        parts = [Part(*new, flow.block, causal=True), *self.prefix.parts(flow, k)]
        if cached is not None and flow.past is not None:
            parts.append(Part(*cached, flow.past))
        y = attend(q, parts, self.spec.attn_scale).reshape(*x.shape[:-1], -1)
        return self.o(y, flow), write(flow, cached, new)

    def heads(self, y: jax.Array, normed: Norm = unchanged) -> jax.Array:
        """[B,T,H*Dh] -> [B,T,H,Dh], normed over the whole width before the cut or over each head after it."""
        shape = (*y.shape[:-1], -1, self.spec.head_dim)
        return normed(y.reshape(shape)) if self.spec.qk_norm == "head" else normed(y).reshape(shape)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, or GeGLU (Shazeer 2020)."""

    def __init__(self, view: View, activation: str):
        self.activation = activation
        self.gate, self.up, self.down = (Dense(below(view, n), f"mlp/{n}") for n in ("gate", "up", "down"))

    def __call__(self, x: jax.Array, flow: SiteFlow) -> jax.Array:
        hidden = ACTIVATIONS[self.activation](self.gate(x, flow)) * self.up(x, flow)
        return self.down(flow.own("mlp/down:in", hidden), flow)


class Block(nnx.Module):
    """x + attention(x), then x + mlp(x), each with a norm before it, after it, or both, as ``spec.norms`` says."""

    def __init__(self, view: View, spec: DecoderSpec):
        pre, post = spec.norms in ("pre", "both"), spec.norms in ("post", "both")
        self.attn_norm, self.mlp_norm = (norm(view, f"{n}_norm", spec, pre) for n in ("attn", "mlp"))
        self.attn_post_norm, self.mlp_post_norm = (norm(view, f"{n}_post_norm", spec, post) for n in ("attn", "mlp"))
        self.attn = Attention(below(view, "attn"), spec)
        self.mlp = GatedMLP(below(view, "mlp"), spec.activation)
        self.attn_adapter, self.mlp_adapter = (Bottleneck(below(view, n)) for n in ("attn", "mlp"))

    def __call__(self, x: jax.Array, flow: Flow, cached: Written | None) -> tuple[jax.Array, Written | None]:
        normed = self.attn_norm(x)
        y, written = self.attn(normed, flow, cached)
        x = x + self.attn_post_norm(self.attn_adapter(normed, y))
        normed = self.mlp_norm(x)
        x = x + self.mlp_post_norm(self.mlp_adapter(normed, self.mlp(normed, flow)))
        flow.see("out", x)
        return x, written
