"""How much a sample counts in CPPO: for learning by its probability, for keeping the old policy by its reward.

Zhang et al. 2024 (ICLR, CPPO), the authors' "linear" weights; card refine-align/cppo.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def high(z: jax.Array, k: float = 0.85, ub: float = 2.5) -> jax.Array:
    """f32[...], from 1 at |z| = k upward to ``ub``."""
    return jnp.minimum(1 + jnp.abs(z) - k, ub)


def low(z: jax.Array, k: float = 0.85, lb: float = 0.5) -> jax.Array:
    """f32[...], from 1 at |z| = k downward to ``lb``."""
    return jnp.maximum(1 - (jnp.abs(z) - k), lb)


def cppo_weights(
    z_probability: jax.Array, z_reward: jax.Array, *, k: float = 0.85, ub: float = 2.5, lb: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """(weight of policy learning, weight of knowledge retention), f32[B] each, of samples whose mean token probability
    and reward stand so many deviations from the mean (f32[B]).

    Both far up: both high. Probable but poor: learning high, retention low. Improbable but good: the same. Both far
    down: both low. All others: 1.
    """
    probable, improbable = z_probability > k, z_probability < -k
    good, poor = z_reward > k, z_reward < -k
    learn_more = (probable & (good | poor)) | (improbable & good)
    learn_less, keep_more = improbable & poor, probable & good
    keep_less = (learn_more & ~keep_more) | learn_less
    learning = jnp.where(learn_more, high(z_probability, k, ub), jnp.where(learn_less, low(z_probability, k, lb), 1.0))
    retention = jnp.where(keep_more, high(z_reward, k, ub), jnp.where(keep_less, low(z_reward, k, lb), 1.0))
    return learning, retention
