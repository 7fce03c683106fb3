"""GRPO: every prompt's responses judge each other, no value head. Card refine-align/rlhf-pieces (5).

Shao et al. 2024 (DeepSeekMath); variants of Liu et al. 2025 (Dr. GRPO). Rollouts as in `jaxcl.methods.ppo`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Method, Own, Params, Phase, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses import policy
from jaxcl.losses.rewards import Reward, each_stage
from jaxcl.methods import rollouts

LENGTHS = ("response", "constant")


@method
def grpo(
    reward: str | Reward | Sequence[str | Reward] = "target_match",
    group: int = 8,
    max_new: int = 32,
    stop_ids: Sequence[int] = (),
    prompt: int | None = None,
    epochs: int = 1,
    reference: str = "previous",
    decay: float = 0.99,
    beta: float = 0.04,
    clip: float = 0.2,
    scale: str = "sample",
    eps: float = 1e-4,
    length: str = "response",
    phase: str | None = None,
    name: str = "grpo",
) -> Method:
    """Replaces the objective by GRPO's on ``group`` responses to each prompt, so that a step has group * B sequences.

    A response's advantage is its reward against its group's, divided by the group's deviation (scale: ``sample``,
    ``population``, ``none``) + eps. The loss of a response is its tokens' mean (length: ``response``) or their sum
    over ``max_new`` (``constant``), clipped surrogate plus beta times KL to the reference (k3). beta 0.04 and epochs 1
    are the paper's; reward, stop_ids, prompt, reference, decay, phase and errors are those of `jaxcl.methods.ppo.ppo`.
    Dr. GRPO is scale ``none``, length ``constant``, beta 0. Log: ``reward``, ``kl``, ``response_tokens``.
    """
    names, rewards = each_stage(reward, name)
    rollouts.check(
        name,
        whole={"max_new": max_new, "prompt": prompt, "epochs": epochs, "group": group},
        positive={"clip": clip},
        share={"decay": decay},
        weight={"beta": beta, "eps": eps},
    )
    if group < 2:
        raise RequestError(f"{name}: group is {group}; accepted: a whole number of at least 2")
    for value, known, what in ((scale, policy.SCALES, "scale"), (length, LENGTHS, "length")):
        if value not in known:
            raise unknown(what, value, known, where=name)
    how = rollouts.Sampling(max_new, tuple(stop_ids), prompt)
    follow = rollouts.following(reference, decay, name)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        return rollouts.without_dropout(world), own or {}

    def init(world: World) -> Own:
        return rollouts.hold(world, reference)

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        mine = rollouts.planned(name, world, own, phases, how, len(rewards), phase)
        change = functools.partial(dataclasses.replace, objective=objective, collect_every=epochs)
        return [change(p) if p in mine else p for p in phases]

    def collect(world: World, own: Own, batch: Batch, key: jax.Array) -> tuple[Batch, Own]:
        asked = {"rows": batch, "reference": rollouts.held(own)}
        return world.tools.call(rolls[min(world.stage, len(rolls) - 1)], asked, key), own

    def roll(score: Reward, forward: Any, train: Params, asked: Batch, key: jax.Array) -> Batch:
        judge = functools.partial(judged, score, forward, train, asked["reference"])
        batch = judge(asked["rows"], jax.random.fold_in(key, 0))
        return batch | rollouts.nested(judge, asked["rows"], key)

    def judged(score: Reward, forward: Any, train: Params, reference: Params, rows: Batch, key: jax.Array) -> Batch:
        """``group`` rollouts of each row with all that the loss needs."""
        rows = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), rollouts.plain(rows))
        batch, response = rollouts.respond(forward, train, rows, key, how)
        mask = batch["weight"]
        old, ref = (-forward(p, batch).nll for p in (train, {**train, **reference}))
        raw = jnp.where(rollouts.real(mask) > 0, score(response, mask, rows), 0.0)
        advantages = policy.group_advantages(raw.reshape(-1, group), scale, eps).reshape(-1, 1) * mask
        log = rollouts.measured(raw, old, ref, mask)
        return batch | {"old_logp": old, "ref_logp": ref, "advantages": advantages, "log": log}

    rolls = [functools.partial(roll, r) for r in rewards]

    def objective(ctx: Ctx) -> jax.Array:
        batch, logp = ctx.batch, -ctx.out.nll
        each = policy.clipped_surrogate(logp, batch["old_logp"], batch["advantages"], clip)
        each = each + beta * policy.k3(logp, batch["ref_logp"])
        divisor = jnp.maximum(jnp.sum(batch["weight"], axis=1), 1.0) if length == "response" else max_new
        return policy.masked_mean(jnp.sum(ctx.weight * each, axis=1) / divisor, rollouts.real(batch["weight"]))

    return Method(
        name=name, hparams={"reward": names}, packs=False, kinds={"reference": "value"}, begin=begin, init=init,
        plan=plan, collect=collect, **follow,
    )  # fmt: skip
