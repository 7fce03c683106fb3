"""Rotary positions (Su et al. 2021), and how Llama 3.1 and others slow them down for longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from .spec import DecoderSpec, RopeScaling

Rope = tuple[jax.Array, jax.Array]


def rates(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """f32[head_dim/2], radians a token, of each rotary pair.

    linear: divided by the factor (Chen et al. 2023, position interpolation). llama3: a pair that turns t times over
    the ``original`` context keeps its rate where t > high, has it divided by the factor where t < low, and mixes the
    two linearly in t between (Grattafiori et al. 2024, section 3.4.2; Meta's reference code).
    """
    plain = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original * plain / (2 * math.pi)
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return plain * ((1 - kept) / scaling.factor + kept)


def rope(spec: DecoderSpec, kind: str, positions: jax.Array) -> Rope:
    """cos and sin [B,T,1,head_dim/2] of the rotary angles of a kind of layer, float32, for positions i32[B,T]."""
    if kind == "local" and spec.local_theta is not None:
        turning = rates(spec.head_dim, spec.local_theta)
    else:
        turning = rates(spec.head_dim, spec.rope_theta, spec.rope_scaling)
    angles = positions[..., None, None].astype(jnp.float32) * turning
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Turns the pairs (x[i], x[i + Dh/2]) of [B,T,H,Dh] by their angles (Hugging Face's half-split order)."""
    cos, sin = (jnp.concatenate([sign * part, part], axis=-1) for sign, part in zip((1, -1), rope))
    wide = x.astype(jnp.float32)
    other = wide.reshape(*x.shape[:-1], 2, -1)[..., ::-1, :].reshape(x.shape)  # each half's partner in its place
    return (wide * cos + other * sin).astype(x.dtype)
