"""The infinite schedule: warm up, cool down, stay; anneal only on a branch. Card cpt/ibrahim-rewarm-redecay-replay.

Ibrahim et al. 2024, arXiv 2403.08763, section 7. It runs on the step of the whole run, over any number of stages,
with the optimizer's state kept (``Experiment(reset_opt=False)``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.errors import RequestError
from jaxcl.transforms.rewarm import by_clock


def infinite_rate(
    s: Any,
    peak: float,
    constant: float,
    floor: float,
    warmup: int,
    cooldown: int,
    anneal: tuple[int, int] | None = None,
) -> jax.Array:
    """f32[]: the rate at step ``s`` of the run.

    Linear from 0 to peak over ``warmup`` steps, cosine from peak to constant over the next ``cooldown`` steps, then
    constant; from a = anneal[0] to e = anneal[1] constant (floor / constant)^((s - a)/(e - a)), and floor after that.
    """
    s = jnp.asarray(s, jnp.float32)
    cooled = jnp.clip((s - warmup) / max(cooldown, 1e-6), 0.0, 1.0)
    rate = constant + 0.5 * (peak - constant) * (1.0 + jnp.cos(jnp.pi * cooled))
    rate = jnp.where(s >= warmup + cooldown, constant, rate)  # to the bit
    rate = jnp.where(s < warmup, peak * s / max(warmup, 1), rate)
    if anneal is not None:
        first, last = anneal
        part = jnp.clip((s - first) / (last - first), 0.0, 1.0)
        rate = jnp.where(s >= first, constant * (floor / constant) ** part, rate)
    return rate


def infinite(
    peak: float = 3e-4,
    constant: float = 1.65e-4,
    floor: float = 3e-5,
    warmup: int = 100,
    cooldown: int = 1000,
    anneal: tuple[int, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The last transform of a chain. anneal: first and last step of the decay that releases a model; train such a
    branch from a stage's checkpoint and continue the trunk from that checkpoint, not from the branch.

    Rates: the paper's at 405M parameters. Raises RequestError unless 0 < floor <= constant <= peak and the anneal
    starts after the cooldown and before it ends.
    """
    if not 0 < floor <= constant <= peak or warmup < 0 or cooldown < 0:
        raise RequestError(
            f"infinite: peak {peak}, constant {constant}, floor {floor}, warmup {warmup}, cooldown {cooldown}; "
            "accepted: 0 < floor <= constant <= peak, steps of at least 0"
        )
    if anneal is not None and not warmup + cooldown <= anneal[0] < anneal[1]:
        wanted = f"(first, last) with {warmup + cooldown} <= first < last"
        raise RequestError(f"infinite: anneal {anneal}; accepted: {wanted}")
    return by_clock(lambda clock: infinite_rate(clock.step, peak, constant, floor, warmup, cooldown, anneal))
