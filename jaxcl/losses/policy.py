"""Policy-gradient and preference losses, and what they are made of. Pure functions; all in float32.

B sequences, N response tokens of each, G responses to one prompt. ``mask`` [B,N] is 1 on response tokens (the end
mark included) and 0 on padding; masks are ones first, and padding never contributes. Log-probabilities are in nats.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Moments = dict[str, jax.Array]
"""Running mean, var (population) and count of scalars, f32[] each."""

SCALES = ("sample", "population", "none")


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """sum(mask * x) / sum(mask), 0 where the mask is empty; the mask may be any weights >= 0. f32[]."""
    total = jnp.sum(mask)
    return jnp.sum(jnp.where(mask > 0, mask * x, 0.0)) / jnp.where(total > 0, total, 1.0)


# what a rollout becomes before it is trained on


def shaped_rewards(score: jax.Array, logp: jax.Array, ref: jax.Array, mask: jax.Array, coef: jax.Array) -> jax.Array:
    """r_k = -coef (logp_k - ref_k) + [k last] score, f32[B,N] (Stiennon et al. 2020; Ouyang et al. 2022, eq. 2).

    score f32[B]; logp, ref f32[B,N] of policy and reference policy; coef f32[].
    """
    last = mask - jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # ones first, so only the last one survives
    return mask * -coef * (logp - ref) + last * score[:, None]


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantages and returns, f32[B,N] each (Schulman et al. 2016, eq. 16).

    delta_k = r_k + gamma V_{k+1} - V_k, A_k = delta_k + gamma lam A_{k+1}, returns = A + V; V after the end is 0.
    """
    rewards, values = mask * rewards, mask * values
    after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = rewards + gamma * after - values

    def back(carry: jax.Array, each: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = each + gamma * lam * carry
        return carry, carry

    _, advantages = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    return mask * advantages.T, mask * advantages.T + values


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8) over the masked entries, var with n - 1; 0 elsewhere."""
    mean, count = masked_mean(x, mask), jnp.sum(mask)
    var = jnp.sum(mask * jnp.square(x - mean)) / jnp.maximum(count - 1, 1.0)
    return mask * (x - mean) * jax.lax.rsqrt(var + 1e-8)


def group_advantages(rewards: jax.Array, scale: str = "sample", eps: float = 1e-4) -> jax.Array:
    """(r - mean) / (std + eps) over the last axis: f32[...,G] -> f32[...,G] (Shao et al. 2024, section 4.1).

    scale: the ``sample`` (n - 1, TRL) or ``population`` standard deviation, or ``none`` (Liu et al. 2025, Dr. GRPO).
    Equal rewards give 0.
    """
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    if scale == "none":
        return centred
    degrees = max(rewards.shape[-1] - (scale == "sample"), 1)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / degrees)
    return centred / (std + eps)


# what a step minimises


def clipped_surrogate(logp: jax.Array, old: jax.Array, advantages: jax.Array, clip: float = 0.2) -> jax.Array:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(logp - old), f32[B,N] (Schulman et al. 2017, eq. 7)."""
    rho = jnp.exp(logp - old)
    return jnp.maximum(-advantages * rho, -advantages * jnp.clip(rho, 1.0 - clip, 1.0 + clip))


def clipped_value(values: jax.Array, old: jax.Array, returns: jax.Array, clip: float = 0.2) -> jax.Array:
    """1/2 max((V - R)^2, (V' - R)^2), V' = V kept within old +- clip, f32[B,N] (the PPO code's value loss)."""
    near = jnp.clip(values, old - clip, old + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def k3(logp: jax.Array, ref: jax.Array) -> jax.Array:
    """exp(ref - logp) - (ref - logp) - 1 >= 0: an unbiased estimate of KL(policy || reference) from the policy's
    samples, per token (Schulman 2020; Shao et al. 2024, eq. 4)."""
    ratio = ref - logp
    return jnp.expm1(ratio) - ratio


# what changes from rollout to rollout


def adapted(coef: jax.Array, kl: jax.Array, n: jax.Array | float, target: float, horizon: float) -> jax.Array:
    """The KL coefficient after n sequences of mean divergence ``kl``: coef (1 + err n / horizon),
    err = clip(kl / target - 1, -0.2, 0.2) (Ziegler et al. 2019, section 2.2)."""
    return coef * (1.0 + jnp.clip(kl / target - 1.0, -0.2, 0.2) * n / horizon)


def no_moments() -> Moments:
    """Moments of nothing yet: mean 0, var 1, count 0."""
    return {"mean": jnp.zeros(()), "var": jnp.ones(()), "count": jnp.zeros(())}


def moments_with(moments: Moments, x: jax.Array, mask: jax.Array) -> Moments:
    """The moments of all so far and of x where mask, both f32[B] (Chan et al. 1979)."""
    n, old = jnp.sum(mask), moments["count"]
    mean = masked_mean(x, mask)
    var = masked_mean(jnp.square(x - mean), mask)
    total = old + n
    safe = jnp.maximum(total, 1.0)
    shift = mean - moments["mean"]
    joined = (moments["var"] * old + var * n + jnp.square(shift) * old * n / safe) / safe
    return {
        "mean": moments["mean"] + shift * n / safe,
        "var": jnp.where(total > 0, joined, moments["var"]),
        "count": total,
    }


def deviation(moments: Moments) -> jax.Array:
    """Sample standard deviation (n - 1), f32[]; 1 where all so far was the same."""
    count = moments["count"]
    var = moments["var"] * count / jnp.maximum(count - 1.0, 1.0)
    return jnp.where(var > 1e-8, jnp.sqrt(var), 1.0)


# preferences


def sequence_logp(nll: jax.Array, mask: jax.Array) -> jax.Array:
    """log pi(y | x): the sum (not the mean) over response tokens, f32[B]. Prompt tokens have mask 0."""
    return -jnp.sum(jnp.where(mask > 0, nll, 0.0), axis=-1)


def dpo(
    better: jax.Array, worse: jax.Array, ref_better: jax.Array, ref_worse: jax.Array, beta: float = 0.1
) -> tuple[jax.Array, jax.Array]:
    """(loss, margin), f32[B] each, from `sequence_logp` of policy and reference (Rafailov et al. 2023, eq. 7).

    margin = beta [(better - ref_better) - (worse - ref_worse)], the difference of implicit rewards; loss =
    -log sigmoid(margin). The share of positive margins is the accuracy.
    """
    margin = beta * ((better - ref_better) - (worse - ref_worse))
    return -jax.nn.log_sigmoid(margin), margin


def preference(better: jax.Array, worse: jax.Array, margin: float = 0.0, centring: float = 0.0) -> jax.Array:
    """-log sigmoid(r_w - r_l - margin) + centring (r_w + r_l)^2 of a reward model's scores, f32[B]
    (Ouyang et al. 2022, eq. 1; the options are TRL's, which centres with 0.01)."""
    return -jax.nn.log_sigmoid(better - worse - margin) + centring * jnp.square(better + worse)
