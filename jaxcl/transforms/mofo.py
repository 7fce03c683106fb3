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

    The k-th largest value is found bit by bit: non-negative floats are ordered as their bit patterns are, so 31
    counting passes take the place of a sort, and counting works on a sharded array as it is.
    """
    flat = x.reshape(-1).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(flat, jnp.int32)

    def refine(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(bits >= higher) >= k, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
    above, equal = bits > threshold, bits == threshold
    left = k - jnp.sum(above)
    return (above | (equal & (jnp.cumsum(equal) <= left))).reshape(x.shape)


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
