"""Relative positions of T5: a learned number a head for each bucket of distances, added to the attention scores.

Raffel et al. 2020, section 2.1; the buckets are those of the T5 code. Half of them are single distances, the others
grow logarithmically up to ``distance``, beyond which all is one bucket.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def bucket_table(buckets: int, distance: int) -> np.ndarray:
    """i32[distance + 1]: the bucket of every distance in one direction, of ``buckets`` in all.

    exact + floor(log(n / exact) / log(distance / exact) * (buckets - exact)) with exact = buckets // 2, in whole
    numbers, so that no rounding decides at a border.
    """
    exact = buckets // 2
    rest = buckets - exact

    def beyond(n: int) -> int:
        """How many of the logarithmic borders are at or below n."""
        return sum(n**rest * exact**k >= distance**k * exact**rest for k in range(1, rest))

    return np.array([n if n < exact else exact + beyond(n) for n in range(distance + 1)], np.int32)


def bucket_of(relative: jax.Array, *, both: bool, buckets: int, distance: int) -> jax.Array:
    """i32 buckets of ``relative``, a key's position minus the query's. both: half of the buckets are for keys behind
    the query (the encoder); else such keys are at distance 0 (the decoder, which does not see them)."""
    if not both:
        return jnp.asarray(bucket_table(buckets, distance))[jnp.clip(-relative, 0, distance)]
    near = jnp.asarray(bucket_table(buckets // 2, distance))[jnp.minimum(jnp.abs(relative), distance)]
    return near + jnp.where(relative > 0, buckets // 2, 0)


def position_bias(
    table: jax.Array, queries: jax.Array, keys: jax.Array, *, both: bool, distance: int
) -> jax.Array:
    """f32[B,H,T,S] from table [buckets,H] for queries at positions i32[B,T] and keys at i32[B,S]; B may be 1."""
    relative = keys[:, None, :] - queries[:, :, None]
    bucket = bucket_of(relative, both=both, buckets=table.shape[0], distance=distance)
    return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)
