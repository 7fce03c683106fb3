"""Bottleneck adapters made. Sources: Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.paths import concrete, is_stacked
from jaxcl.core.types import Params
from jaxcl.errors import RequestError
from jaxcl.models.bottleneck import SCALE
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.t5_spec import T5Spec

PLACES = {
    "houlsby": ("attn/adapter", "mlp/adapter"),
    "pfeiffer": ("mlp/adapter",),
    "parallel": ("mlp/parallel",),
}
"""{style: its adapters in a block}."""
STD = 1e-2
"""Of the down projection's truncated normal draw (Houlsby et al., section 3.6)."""


def check(spec: Any, width: int, name: str) -> None:
    """RequestError for a model that takes no adapters, and a bottleneck that is none."""
    if not isinstance(spec, DecoderSpec | T5Spec):
        raise RequestError(f"{name}: a {type(spec).__name__} takes no bottleneck adapters; accepted: a decoder, a T5")
    if not 1 <= width <= spec.width:
        raise RequestError(f"{name}: width is {width}; accepted: 1 to {spec.width}, the model's own")


def fresh(spec: Any, style: str, width: int, key: jax.Array) -> Params:
    """{layers/../mlp/adapter_down: f32[d, m], ..} that change nothing yet: U, b and c are zero. Every layer draws its D
    with a key of its own name, so that stacking changes no number."""
    out: Params = {}
    for prefix in spec.blocks:
        for place in PLACES[style]:
            path = f"{prefix}/{place}_down"
            keys = [jax.random.fold_in(key, zlib.crc32(p.encode())) for p in concrete(path)]
            shape = (spec.width, width)
            drawn = [STD * jax.random.truncated_normal(k, -2.0, 2.0, shape, jnp.float32) for k in keys]
            lead = (len(keys),) if is_stacked(path) else ()
            out[path] = jnp.stack(drawn) if lead else drawn[0]
            out[f"{prefix}/{place}_down_bias"] = jnp.zeros((*lead, width), jnp.float32)
            out[f"{prefix}/{place}_up"] = jnp.zeros((*lead, width, spec.width), jnp.float32)
            out[f"{prefix}/{place}_up_bias"] = jnp.zeros((*lead, spec.width), jnp.float32)
    return out


def scales(spec: Any, style: str, scale: float) -> Params:
    """{layers/../mlp/parallel_scale: f32[]} of the parallel style, which is not trained."""
    blocks = spec.blocks if style == "parallel" else {}
    lead = {prefix: (repeats,) if repeats > 1 else () for prefix, repeats in blocks.items()}
    return {f"{prefix}/mlp/{SCALE}": jnp.full(shape, scale, jnp.float32) for prefix, shape in lead.items()}


def norm_deltas(params: Params) -> Params:
    """{../attn_norm/scale_delta: zeros}: a change of each norm's scale, of its own."""
    ends = ("attn_norm/scale", "mlp_norm/scale", "attn_post_norm/scale", "mlp_post_norm/scale", "final_norm/scale")
    return {k + "_delta": jnp.zeros(v.shape, jnp.float32) for k, v in params.items() if k.endswith(ends)}
