"""Distillation: the student's next-token distribution against a teacher's. All in float32, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl(teacher: jax.Array, student: jax.Array, temperature: float = 2.0) -> jax.Array:
    """T^2 KL(q_T || p_T) of logits [..., V] -> [...]: forward, teacher first (Hinton et al. 2015, section 2.1).

    q_T = softmax(teacher / T), p_T = softmax(student / T). The gradient in the student is T (p_T - q_T). No gradient
    reaches the teacher.
    """
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def kl_top(index: jax.Array, value: jax.Array, student: jax.Array, temperature: float = 2.0) -> jax.Array:
    """As `kl` with a teacher known by its k largest logits: index i32[..., k], value f32[..., k] -> [...].

    The teacher's distribution is that over its k entries; the student's is over all V. With k = V it is `kl`.
    """
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(value).astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_p = jnp.take_along_axis(log_p, index, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` where ``mask``; 0 where it is empty. f32[]."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
