"""MoFO: Adam that moves only the entries with the largest momentum of each tensor. Card cft/mofo.

Chen et al. 2024, arXiv 2407.20999. An ordinary optax transform for any pytree of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.core.paths import per_tensor
from jaxcl.errors import RequestError

_UNFILTERED = re.compile("bias|norm", re.IGNORECASE)


def unfiltered(path: str) -> bool:
    """The reference's rule: leaves with ``bias`` or ``norm`` in their name take the full Adam step."""
    return _UNFILTERED.search(path) is not None


def top_mask(x: jax.Array, k: int) -> jax.Array:
    """bool in the shape of ``x``: exactly its k largest entries, the lowest index first among equals. x >= 0, f32.

    Non-negative floats are ordered as their bit patterns are. Passes that count the entries from a pattern on take the
    place of a sort: a sample says where to begin, and about ten of them are enough. Counting works on a sharded array.
    """
    flat = x.reshape(-1).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(flat, jnp.int32)
    threshold, excess = cut(bits, k)
    index = jnp.arange(bits.size, dtype=jnp.int32)
    equal = bits == threshold

    def narrower(ends: tuple) -> tuple:
        low, high = ends
        middle = low + (high - low) // 2
        enough = count(equal & (index < middle)) >= left
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Of equals at the threshold the first ones count, those before `last`; without an excess all do.
    left = jnp.sum(equal) - excess
    last = jax.lax.while_loop(
        lambda ends: (excess > 0) & (ends[1] - ends[0] > 1), narrower, (jnp.int32(0), jnp.int32(bits.size))
    )[1]
    return ((bits > threshold) | (equal & (index < last))).reshape(x.shape)


def count(mask: jax.Array) -> jax.Array:
    """i32[]: how many are true. Summing floats is three times as fast on a CPU, and exact below 2^24."""
    return jnp.sum(mask.astype(jnp.float32)).astype(jnp.int32) if mask.size < 2**24 else jnp.sum(mask)


def cut(bits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(t, excess): k + excess entries of ``bits`` i32[n], n >= k, are at least t, and no larger t has k of them but
    where the excess is 0. All >= 0.

    Between two ends that hold the k-th largest, a guess is by the counts at the ends, every third one the middle.
    """
    (low, high), top = around(bits, k), jnp.int32(jnp.iinfo(jnp.int32).max)
    at_low, at_high = count(bits >= low), count(bits >= high)
    # A sample may be wrong: then an end moves to where its count is known.
    low, at_low, high, at_high = (
        jnp.where(at_high >= k, high, jnp.where(at_low < k, 0, low)),
        jnp.where(at_high >= k, at_high, jnp.where(at_low < k, bits.size, at_low)),
        jnp.where(at_high >= k, top, jnp.where(at_low < k, low, high)),
        jnp.where(at_high >= k, 0, jnp.where(at_low < k, at_low, at_high)),
    )

    def undecided(state: tuple) -> jax.Array:
        _, low, at_low, high, _ = state
        return (at_low > k) & (high - low > 1)

    def guess(state: tuple) -> tuple:
        i, low, at_low, high, at_high = state
        share = jnp.where(i % 3 == 2, 0.5, (at_low - k + 0.5) / (at_low - at_high).astype(jnp.float32))
        step = (share * (high - low).astype(jnp.float32)).astype(jnp.int32)
        here = jnp.clip(low + step, low + 1, high - 1)
        found = count(bits >= here)
        enough = found >= k
        return (
            i + 1,
            jnp.where(enough, here, low), jnp.where(enough, found, at_low),
            jnp.where(enough, high, here), jnp.where(enough, at_high, found),
        )  # fmt: skip

    _, low, at_low, _, _ = jax.lax.while_loop(undecided, guess, (jnp.int32(0), low, at_low, high, at_high))
    return low, at_low - k


def around(bits: jax.Array, k: int, size: int = 8192, deviations: float = 2.0) -> tuple[jax.Array, jax.Array]:
    """Two bit patterns that most likely have the k-th largest between them, from about ``size`` entries."""
    sample = bits[:: max(1, bits.size // size) | 1]
    share, m = k / bits.size, sample.size
    slack = deviations * jnp.sqrt(share * (1 - share) / m)
    ranks = jnp.clip(jnp.stack([(share + slack) * m + 2, (share - slack) * m]).astype(jnp.int32), 1, m)

    def refine(i: jax.Array, patterns: jax.Array) -> jax.Array:
        higher = patterns | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(sample >= higher[:, None], axis=1) >= ranks, higher, patterns)

    low, high = jax.lax.fori_loop(0, 16, refine, jnp.zeros(2, jnp.int32))  # to 1 in 256; the upper end rounded up
    return low, high + (1 << 15)


def scale_by_mofo(
    fraction: float = 0.15,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    full: Callable[[str], bool] = unfiltered,
) -> optax.GradientTransformation:
    """Adam's direction, zero outside the max(1, int(fraction * n)) entries of each tensor with the largest |momentum|.

    Moments of all entries are updated every step. A stacked leaf (a path with a layer slice) is filtered layer by
    layer. full: paths that are not filtered. fraction 1 is Adam bit for bit. Defaults: the released scripts'.
    Raises RequestError for a fraction outside (0, 1]. State: that of ``optax.scale_by_adam``.
    """
    if not 0 < fraction <= 1:
        raise RequestError(f"mofo: fraction is {fraction}; accepted: above 0, at most 1")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)

        def one(u: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(top_mask(jnp.abs(m), max(1, int(m.size * fraction))), u, 0)

        def leaf(path: tuple, u: jax.Array, m: jax.Array) -> jax.Array:
            name = "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path)
            return u if fraction == 1 or full(name) else per_tensor(one, name, u, m)

        return jax.tree_util.tree_map_with_path(leaf, updates, state.mu), state

    return optax.GradientTransformation(adam.init, update)


def mofo(
    learning_rate: optax.ScalarOrSchedule = 2e-5,
    fraction: float = 0.15,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """The MoFO optimizer. Weight decay, 0 in every released script, reaches all entries, selected or not."""
    parts = [scale_by_mofo(fraction, b1, b2, eps)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
