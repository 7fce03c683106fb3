"""Learning rates that start anew with every stage: linear re-warming, cosine re-decay. Card cpt/rewarm-gupta.

Gupta et al. 2023, arXiv 2308.04014; Ibrahim et al. 2024, arXiv 2403.08763. Read off the clock that the train step
hands to every optimizer, so nothing is stored and a resume continues at the same rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.errors import RequestError


def rewarm_rate(s: Any, total: Any, peak: float, floor: float, warmup: float, start: float = 0.0) -> jax.Array:
    """f32[]: the rate at step ``s`` of a stage of ``total`` steps.

    start + (peak - start) s / w for s <= w, then floor + (peak - floor)/2 (1 + cos(pi (s - w)/(total - w))); w =
    ``warmup`` steps, or that share of ``total`` where it is below 1. w = 0 starts at the peak.
    """
    s, total = jnp.asarray(s, jnp.float32), jnp.asarray(total, jnp.float32)
    w = jnp.minimum(warmup * total if warmup < 1 else warmup, total)
    rising = start + (peak - start) * s / jnp.maximum(w, 1e-6)
    done = jnp.clip((s - w) / jnp.maximum(total - w, 1e-6), 0.0, 1.0)
    return jnp.where(s < w, rising, floor + 0.5 * (peak - floor) * (1.0 + jnp.cos(jnp.pi * done)))


def by_clock(rate: Callable[[Any], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Scales updates by -rate(clock); the last transform of a chain. Stateless.

    Raises RequestError in a loop that does not pass ``clock=`` to ``update``.
    """

    def update(updates: Any, state: Any, params: Any = None, *, clock: Any = None, **_: Any) -> tuple[Any, Any]:
        if clock is None:
            raise RequestError("this learning rate reads the clock: call tx.update(grads, state, params, clock=clock)")
        factor = -rate(clock)
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def rewarm(
    peak: float = 3e-4, floor: float | None = None, warmup: float = 0.01, start: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Every stage (every phase) warms up to ``peak`` and decays to ``floor`` (default: a tenth of the peak).

    warmup: steps, or a share of the stage where below 1. start: the rate of the first step. With Adam's state reset per
    stage, the experiment's default, this is the recipe of both papers. Raises RequestError for rates below 0, a floor
    above the peak, a negative warmup.
    """
    low = 0.1 * peak if floor is None else floor
    if not 0 <= low <= peak or start < 0 or warmup < 0:
        raise RequestError(
            f"rewarm: peak {peak}, floor {low}, start {start}, warmup {warmup}; "
            "accepted: 0 <= floor <= peak, the rest at least 0"
        )
    return by_clock(lambda clock: rewarm_rate(clock.phase_step, clock.phase_len, peak, low, warmup, start))
