"""Which tokens count: masks of an exact size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def top_share(score: jax.Array, valid: jax.Array, share: float) -> jax.Array:
    """bool like ``valid``: the round(share * n) highest scores among the n valid entries, of the whole array together.

    The count is exact (a half rounds to even); of equal scores the earlier entry is taken. There is no gradient: a mask
    is no number. Over a sharded array the ranking is that of the whole, not of each shard.
    """
    order = jnp.lexsort((-score.astype(jnp.float32).ravel(), ~valid.ravel()))  # valid first, then by score; stable
    count = jnp.asarray(np.round(share * np.arange(valid.size + 1)), jnp.int32)[jnp.sum(valid)]  # in f64, on the host
    return jnp.zeros(valid.size, bool).at[order].set(jnp.arange(valid.size) < count).reshape(valid.shape)
