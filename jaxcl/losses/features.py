"""Distances between features, hidden states of two models on the same rows. All in float32.

student, teacher: [B, P, D], features at P positions of B rows; mask: bool [B, P], which of them count. No gradient
reaches the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl.losses.distillation import masked_mean


def l2(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over features of ||s - t||^2 / D. f32[]."""
    return masked_mean(jnp.mean(jnp.square(_f32(student) - _still(teacher)), axis=-1), mask)


def cosine(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over features of 1 - cos(s, t), as half the squared distance of unit vectors: where they are equal it and
    its gradient are 0 to the square of the rounding, not to the rounding. f32[]."""
    away = jnp.sum(jnp.square(unit(_f32(student)) - unit(_still(teacher))), axis=-1)
    return masked_mean(0.5 * away, mask)


def relational(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """||K(s) - K(t)||_F^2, K the Gram matrix of unit features: over the batch's rows where P is 1, else over the
    positions of each row, as a mean over rows. No rotation of either's features changes it. f32[]."""
    if mask.shape[1] == 1:
        student, teacher, mask = (jnp.swapaxes(x, 0, 1) for x in (student, teacher, mask))
    with jax.default_matmul_precision("highest"):
        grams = [jnp.einsum("bpd,bqd->bpq", x, x) for x in (unit(_f32(student)), unit(_still(teacher)))]
    pairs = mask[:, :, None] & mask[:, None, :]
    away = jnp.sum(jnp.where(pairs, jnp.square(grams[0] - grams[1]), 0.0), axis=(1, 2))
    return masked_mean(away, jnp.any(mask, axis=1))


def unit(x: jax.Array) -> jax.Array:
    """x / ||x|| along the last axis; zeros stay zeros and have no gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _still(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x).astype(jnp.float32)


DISTANCES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "l2": l2, "cosine": cosine, "relational": relational
}  # fmt: skip
