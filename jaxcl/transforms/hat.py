"""The arithmetic of hard attention to the task: annealing, masks, what may change. Serra et al. 2018.

Plain functions on arrays. e: an embedding f32[units]; a = sigmoid(s e): the mask; A: the largest mask of all past tasks
at s_max, "used", f32[units] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def anneal(step: Any, length: Any, s_max: float, sweeps: int = 1) -> jax.Array:
    """s of a step (counted from 0) among ``length``, f32[]: 1/s_max + (s_max - 1/s_max) (b-1)/(B-1) (equation 3), where
    batch b of B counts anew in each of the ``sweeps`` that divide the length."""
    step, length = jnp.asarray(step, jnp.int32), jnp.asarray(length, jnp.int32)
    sweep = step * sweeps // length
    first, last = (-(-(sweep + n) * length // sweeps) for n in (0, 1))
    part = (step - first) / jnp.maximum(last - first - 1, 1)
    return (1 / s_max + (s_max - 1 / s_max) * part).astype(jnp.float32)


@jax.custom_jvp
def soft_step(x: jax.Array) -> jax.Array:
    """sigmoid(x), whose derivative keeps its digits where the sigmoid is close to 1."""
    return jax.nn.sigmoid(x)


@soft_step.defjvp
def _soft_step_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # s(x) (1 - s(x)) is a handful of rounding errors from x = 12 on, and the compensation blows them up.
    (x,), (t,) = primals, tangents
    return soft_step(x), t * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def compensate(grad: jax.Array, e: jax.Array, s: jax.Array | float, s_max: float) -> jax.Array:
    """The gradient of e as if its mask had slope s_max at e: g s_max/s (cosh(clip(s e, -50, 50)) + 1) / (cosh(e) + 1),
    section 2.5."""
    steep = jnp.cosh(jnp.clip(s * e, -50.0, 50.0)) + 1.0
    return grad * (s_max / s) * steep / (jnp.cosh(e) + 1.0)


def bounded(update: jax.Array, e: jax.Array, limit: float = 6.0) -> jax.Array:
    """The update of e cut so that e stays in [-limit, limit]."""
    return jnp.clip(e + update, -limit, limit) - e


def protect(update: jax.Array, used_in: jax.Array, used_out: jax.Array) -> jax.Array:
    """update [in, out] times 1 - min(A_in, A_out) (equation 2): what joins two used units stays as it is."""
    return update * (1.0 - jnp.minimum(used_in[:, None], used_out[None, :])).astype(update.dtype)


def sparsity(masks: Mapping[str, jax.Array], used: Mapping[str, jax.Array]) -> jax.Array:
    """sum a (1 - A) / sum (1 - A) over all layers (equation 6), f32[] in [0, 1]; 0 where no unit is free."""
    taken = jnp.asarray(sum(jnp.sum(masks[k] * (1.0 - used[k])) for k in used))
    free = jnp.asarray(sum(jnp.sum(1.0 - used[k]) for k in used))
    return taken / jnp.maximum(free, jnp.finfo(jnp.float32).tiny)
