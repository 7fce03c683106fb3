"""PPO on rewards, stage after stage: rollouts, a value head, a reference policy. Card refine-align/rlhf-pieces (3, 6).

Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022. Every ``epochs`` steps a batch of prompts becomes
rollouts, scored, held against the reference and turned into advantages in one compiled call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Method, Own, Params, Phase, World, method
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.losses import policy
from jaxcl.losses.rewards import Reward, each_stage
from jaxcl.methods import rollouts

KERNEL, BIAS = "value_head/kernel", "value_head/bias"


@method
def ppo(
    reward: str | Reward | Sequence[str | Reward] = "target_match",
    max_new: int = 32,
    stop_ids: Sequence[int] = (),
    prompt: int | None = None,
    epochs: int = 4,
    reference: str = "previous",
    decay: float = 0.99,
    kl_coef: float = 0.05,
    kl_target: float | None = 6.0,
    kl_horizon: float = 10_000.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 1.0,
    reward_clip: float = 10.0,
    scale_reward: bool = True,
    ptx: float = 0.0,
    phase: str | None = None,
    name: str = "ppo",
) -> Method:
    """Replaces the objective by PPO's on responses of at most ``max_new`` tokens, sampled from the policy.

    reward: ``'token:65'``, ``'length:20'``, ``'target_match'`` or a function (see `jaxcl.losses.rewards`), or a list
    with one for each stage; divided by the running deviation of all rewards so far (scale_reward), then clipped.
    stop_ids: end marks. prompt: most tokens of a row that are its prompt (None: all before its targets). epochs: steps
    on one batch of rollouts. reference: the policy that the KL penalty holds on to: ``initial``, ``previous`` (as the
    stage began) or ``ema`` (averaged with ``decay`` after every step). kl_coef: its weight at first, adapted to
    ``kl_target`` nats a response (None: constant). ptx: weight of the language model's loss on the rows' own targets.
    phase: the one phase to train so (None: all). Defaults are trlx's.

    The value head is ``value_head/*``, linear and zero at first. Adapter dropout is turned off; list adapters in front.
    Log: ``reward`` as given, ``kl`` to the reference (k3, nats a response), ``kl_coef``, ``response_tokens``. Under
    accumulation the parts of a batch count by their response tokens. Raises RequestError for values out of range,
    unknown names, a stage without a reward, a window that does not leave room for the response.
    """
    names, rewards = each_stage(reward, name)
    rollouts.check(
        name,
        whole={"max_new": max_new, "prompt": prompt, "epochs": epochs},
        positive={"kl_target": kl_target, "kl_horizon": kl_horizon, "clip": clip, "value_clip": value_clip,
                  "reward_clip": reward_clip},
        share={"gamma": gamma, "lam": lam, "decay": decay},
        weight={"kl_coef": kl_coef, "value_coef": value_coef, "ptx": ptx},
    )  # fmt: skip
    how = rollouts.Sampling(max_new, tuple(stop_ids), prompt)
    follow = rollouts.following(reference, decay, name)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        world = rollouts.without_dropout(world)
        return (with_value_head(world), {}) if own is None else (world, own)

    def init(world: World) -> Own:
        held = rollouts.hold(world, reference)
        live = {"kl_coef": jnp.float32(kl_coef), "rewards": policy.no_moments()}
        return {**held, "live": {**held.get("live", {}), **live}}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        mine = rollouts.planned(name, world, own, phases, how, len(rewards), phase)
        change = functools.partial(dataclasses.replace, objective=surrogate, collect_every=epochs)
        return [change(p) if p in mine else p for p in phases]

    def collect(world: World, own: Own, batch: Batch, key: jax.Array) -> tuple[Batch, Own]:
        live = {k: v for k, v in own["live"].items() if k != "reference"}
        asked = {"rows": batch, "reference": rollouts.held(own), "live": live}
        made, new = world.tools.call(rolls[min(world.stage, len(rolls) - 1)], asked, key)
        return made, {**own, "live": {**own["live"], **new}}

    def roll(score: Reward, forward: Any, train: Params, asked: Batch, key: jax.Array) -> tuple[Batch, Any]:
        judge = functools.partial(judged, score, forward, train, asked["reference"], asked["live"])
        batch, live = judge(asked["rows"], jax.random.fold_in(key, 0))
        batch |= rollouts.nested(lambda rows, key: judge(rows, key)[0], asked["rows"], key)
        return batch | ({"ptx": rollouts.plain(asked["rows"])} if ptx else {}), live

    def judged(
        score: Reward, forward: Any, train: Params, reference: Params, live: Any, rows: Batch, key: jax.Array
    ) -> tuple[Batch, Any]:
        """Rollouts of the rows with all that the loss needs, and the live memory after them."""
        batch, response = rollouts.respond(forward, train, rows, key, how)
        mask, out = batch["weight"], forward(train, batch)
        old, ref = -out.nll, -forward({**train, **reference}, batch).nll
        real, coef = rollouts.real(mask), live["kl_coef"]
        raw = jnp.where(real > 0, score(response, mask, rows), 0.0)
        moments = policy.moments_with(live["rewards"], raw, real)
        scaled = raw / policy.deviation(moments) if scale_reward else raw
        final = jnp.clip(scaled, -reward_clip, reward_clip)
        shaped = policy.shaped_rewards(final, old, ref, mask, coef)
        guess = mask * values(train, out.hidden, batch["targets_at"])
        advantages, returns = policy.gae(shaped, guess, mask, gamma, lam)
        log = rollouts.measured(raw, old, ref, mask)
        log["kl_coef"] = jnp.full(len(real), coef)
        if kl_target is not None:
            coef = policy.adapted(coef, log["kl"][0], jnp.sum(real), kl_target, kl_horizon)
        batch |= {"old_logp": old, "old_values": guess, "rewards": shaped, "returns": returns, "log": log}
        return batch | {"advantages": policy.whiten(advantages, mask)}, {"kl_coef": coef, "rewards": moments}

    rolls = [functools.partial(roll, r) for r in rewards]

    def surrogate(ctx: Ctx) -> jax.Array:
        batch = ctx.batch
        each = policy.clipped_surrogate(-ctx.out.nll, batch["old_logp"], batch["advantages"], clip)
        return policy.masked_mean(each, ctx.weight)

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        batch = ctx.batch
        if "old_logp" not in batch:  # a phase that is not ours
            return {}
        now = values(ctx.params, ctx.out.hidden, batch["targets_at"])
        each = policy.clipped_value(now, batch["old_values"], batch["returns"], value_clip)
        terms = {"value": value_coef * policy.masked_mean(each, batch["weight"])}
        if ptx:
            rows = batch["ptx"]
            nll = ctx.model(ctx.spec, ctx.params, rows, train=True, key=ctx.key).nll
            terms["ptx"] = ptx * policy.masked_mean(nll, rows["weight"])
        return terms

    return Method(
        name=name, hparams={"reward": names}, packs=False, kinds={"reference": "value"}, begin=begin, init=init,
        plan=plan, collect=collect, loss=loss, **follow,
    )  # fmt: skip


def with_value_head(world: World) -> World:
    """The world with a linear value head of zeros on the last hidden state. Raises KeyTaken where there is one,
    RequestError for a model that does not say how wide it is."""
    if KERNEL in world.params:
        raise KeyTaken(f"{KERNEL!r} is there already; one method at a time has a value head", KERNEL)
    width = getattr(world.spec, "width", None)
    if width is None:
        raise RequestError("a value head needs the width of the model's last hidden state; its spec has no 'width'")
    head = {KERNEL: jnp.zeros((width, 1), jnp.float32), BIAS: jnp.zeros(1, jnp.float32)}
    return world._replace(params={**world.params, **head})


def values(params: Params, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """V before each target, f32[B,N]: the head on the hidden state [B,T,D] of the token before ``at`` i32[B,N]."""
    here = jnp.take_along_axis(hidden, jnp.maximum(at - 1, 0)[..., None], axis=1).astype(jnp.float32)
    return (here @ params[KERNEL] + params[BIAS])[..., 0]

