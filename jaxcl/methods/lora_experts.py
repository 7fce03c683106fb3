"""LoRA experts: a router mixes low-rank adapters token by token, and every stage opens one more.

Card cft/moe-adapters-lora-experts. After LoRAMoE (Dou et al., ACL 2024: soft routing in float32), MoELoRA (Chen et al.
2024) and MoE-Adapters (Yu et al., CVPR 2024: what was used most is frozen when a stage ends).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.paths import per_tensor, sites
from jaxcl.core.types import Clock, Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora_scale, with_dropout
from jaxcl.surgery.edit import carry, operated, restart
from jaxcl.surgery.experts import ROUTER, add_experts, doubled

TRAINED = ("/expert_a", "/expert_b", "/expert_router")
BIAS = "/expert_bias"
KINDS = {"frozen": "mask", "mass": "gradient", "sites": "sites"}


@method
def lora_experts(
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.05,
    targets: Sequence[str] = ("mlp/*",),
    first: int = 1,
    balance: float = 0.0,
    keep: float = 1.0,
    max_experts: int = 16,
    grow: bool = True,
    name: str = "lora_experts",
) -> Method:
    """Freezes the base and trains y += sum_e g_e (alpha/rank) B_e A_e x, the gates g a softmax over the open experts.

    The first stage has ``first`` experts, every later one opens one more, which takes its share of the gates from the
    others. At a stage's end each site freezes, of the experts that still train, the one with the largest sum of gates
    over the stage's tokens. balance: times the squared coefficient of variation of the rows' gate sums, summed over
    sites (LoRAMoE's). keep: times the mean KL of the gates from those of the stage's start on tokens of past stages,
    where another method brings such rows. max_experts, grow: room, which doubles with one new compilation, or is
    refused. Defaults: LoRAMoE's script, in all of a block's MLP. Raises RequestError for what is out of range, an
    unknown target.
    """
    scale = lora_scale(rank, alpha, False)
    if first < 1 or max_experts < first or balance < 0 or keep < 0:
        given = f"first {first}, max_experts {max_experts}, balance {balance}, keep {keep}"
        raise RequestError(f"{name}: {given}; accepted: 1 <= first <= max_experts, balance >= 0, keep >= 0")

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            where, spec = sites(world.params, targets), with_dropout(world.spec, dropout)
            params = add_experts(world.params, where, rank, scale, first, max_experts, world.key, keep > 0)
            world = world._replace(params=params, spec=spec)
            return world, {**unused(params, where), "host": {"sites": where, "opened": first}}
        where, opened = own["host"]["sites"], own["host"]["opened"]
        room = world.params[where[0] + BIAS].shape[-1]
        if opened >= room and not grow:
            raise RequestError(f"{name}: expert {opened + 1} exceeds max_experts={room}; raise it, or set grow to true")
        if opened >= room:
            edit = doubled(world.params, where, world.key)
            world, own = operated(world, world.spec, edit), carry(own, KINDS, (edit,))
        fills: Params = {}
        for site in where:
            old = {part: world.params[f"{site}/{part}"] for part in ROUTER}
            fills |= {f"{site}/{part}_old": value + 0.0 for part, value in old.items()} if keep else {}
            fills[site + BIAS] = old["expert_bias"].at[..., opened].set(0.0)
        return restart(world, fills), {**own, "host": {"sites": where, "opened": opened + 1}}

    def mask(world: World, own: Own) -> dict[str, bool]:
        return {k: k.endswith(TRAINED) for k in world.params}

    def project(updates: Params, params: Params, own: Own, clock: Clock) -> Params:
        out = dict(updates)
        for key, frozen in own["fixed"]["frozen"].items():
            for part in ("expert_a", "expert_b"):
                path = key.removesuffix(BIAS) + "/" + part
                if path in out:
                    out[path] = per_tensor(held, path, out[path], frozen, params[key])
        return out

    def observe(ctx: Ctx, grads: Params, updates: Params, params: Params) -> Any:
        mass = ctx.own["live"]["mass"]
        return {"mass": {k: m + jnp.sum(noted(ctx, k, "mass"), axis=-2) for k, m in mass.items()}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        named: dict[str, jax.Array] = {}
        where = list(ctx.own["live"]["mass"])
        if balance:
            spread = [uneven(noted(ctx, k, "mass"), jnp.isfinite(ctx.params[k])) for k in where]
            named["balance"] = balance * jnp.asarray(sum(spread))
        if keep:
            old = (ctx.batch["stage"] >= 0) & (ctx.batch["stage"] < ctx.clock.stage)
            tokens = jnp.maximum(jnp.sum(old[:, None] * (ctx.batch["segments"] > 0)), 1)
            drift = [per_tensor(lambda d: jnp.sum(old * d), k, noted(ctx, k, "drift")) for k in where]
            layers = sum(d.size for d in drift)
            named["router"] = keep * jnp.asarray(sum(map(jnp.sum, drift))) / (tokens * layers)
        return named

    def end(world: World, own: Own) -> tuple[World, Own]:
        mass, frozen = own["live"]["mass"], own["fixed"]["frozen"]
        now = {k: per_tensor(most_used, k, mass[k], frozen[k], world.params[k]) for k in frozen}
        memory = {"fixed": {"frozen": now}, "live": {"mass": jax.tree.map(jnp.zeros_like, mass)}}
        return world, {**own, **memory}

    return Method(
        name=name, packs=not balance, begin=begin, mask=mask, project=project, observe=observe, end=end,
        loss=loss if balance or keep else None, kinds=KINDS,
    )  # fmt: skip


def unused(params: Params, where: Sequence[str]) -> Own:
    """The memory of a first stage, {expert_bias key: zeros} twice: which of a site's experts are frozen, and the sums
    of their gates so far."""
    none = {site + BIAS: jnp.zeros_like(params[site + BIAS]) for site in where}
    return {"fixed": {"frozen": none}, "live": {"mass": none}}


def held(update: jax.Array, frozen: jax.Array, bias: jax.Array) -> jax.Array:
    """The update [N,..] without that of frozen and closed experts [N]."""
    stays = (frozen > 0) | ~jnp.isfinite(bias)
    return jnp.where(stays.reshape(-1, *(1,) * (update.ndim - 1)), 0, update).astype(update.dtype)


def noted(ctx: Ctx, key: str, what: str) -> jax.Array:
    """What the site of an expert_bias key left in the forward pass."""
    return ctx.out.aux[key.removesuffix(BIAS)][f"experts/{what}"]


def uneven(mass: jax.Array, open_: jax.Array) -> jax.Array:
    """f32[]: the squared coefficient of variation, by the unbiased variance, of the gate sums [.., B, N] of the open
    experts bool[.., N], each layer's own, summed over layers. Rows without tokens do not count."""
    real = (jnp.sum(mass, axis=-1, keepdims=True) > 0) & open_[..., None, :]
    n = jnp.sum(real, axis=(-2, -1), keepdims=True)
    mean = jnp.sum(jnp.where(real, mass, 0), axis=(-2, -1), keepdims=True) / jnp.maximum(n, 1)
    square = jnp.sum(jnp.where(real, jnp.square(mass - mean), 0), axis=(-2, -1), keepdims=True)
    return jnp.sum(square / jnp.maximum(n - 1, 1) / jnp.maximum(jnp.square(mean), 1e-12))


def most_used(mass: jax.Array, frozen: jax.Array, bias: jax.Array) -> jax.Array:
    """``frozen`` f32[N] with one expert more: of those that are open and train, the one with the largest gate sum."""
    free = jnp.isfinite(bias) & (frozen == 0)
    chosen = jnp.argmax(jnp.where(free, mass, -1.0))
    return jnp.where(jnp.any(free), frozen.at[chosen].set(1.0), frozen)
