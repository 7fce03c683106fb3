"""MIR: of many rows in memory the ones that the coming step would hurt most are replayed. Card cft/mir.

Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin, Tuytelaars, NeurIPS 2019. Every step looks ahead with the
optimizer's own step on the new rows and scores C rows of a memory by how much their loss rises.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.types import Batch, Budget, Clock, Ctx, GradFn, Gradient, Method, Own, Params, Phase, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.methods import memory
from jaxcl.methods.agem import with_reference

SCORES = ("s1", "s2")


@method
def mir(
    candidates: int = 4,
    rows: int | None = None,
    capacity: int = 4096,
    score: str = "s1",
    policy: str = "reservoir",
    seed: int = 0,
    name: str = "mir",
) -> Method:
    """Trains on the new rows and on the ``rows`` (None: as many as are new) of highest score among the candidates.

    candidates: batches of rows drawn from the memory every step, C in all; 4 of the batch's size. score: with L(c) the
    mean loss of a row's targets and theta' the parameters one step ahead, ``s1`` is L(c; theta') - L(c; theta), ``s2``
    L(c; theta') - min(L(c; theta), the least loss of c so far). Of equal scores the first is taken. Where the memory
    holds fewer rows than are drawn they repeat. capacity, policy, seed: of the memory, as in `replay`.

    The gradient is that of new and chosen rows as one batch. A step costs one more gradient and two forward passes of
    all candidates once there is a memory, nothing before. Raises RequestError for no candidates, negative rows or
    capacity, an unknown score or policy, more rows than candidates.
    """
    memory.check("mir", policy, capacity=capacity)
    if candidates < 1 or (rows is not None and rows < 1):
        raise RequestError(f"mir: candidates {candidates}, rows {rows}; accepted: at least 1, rows also None")
    if score not in SCORES:
        raise unknown("score", score, SCORES, where="mir")
    slots = [f"{name}/{i}" for i in range(candidates)]

    def init(world: World) -> Own:
        own = memory.empty(world)
        return own | tables(own["host"], capacity, None) if score == "s2" else own

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        """Every candidates' stream has its own part of the memory, so that a step draws no row twice."""
        held = memory.listed(own["host"])
        for i, slot in enumerate(slots):
            mine = held[i :: len(slots)]
            by_stage = {int(s): mine[mine[:, 0] == s, 1] for s in np.unique(mine[:, 0])}
            phases = [with_reference(p, slot, by_stage) for p in phases]
        return phases

    def end(world: World, own: Own) -> tuple[World, Own]:
        new = memory.remember(world, own, policy, capacity, seed)
        return world, new | tables(new["host"], capacity, own) if score == "s2" else new

    def grad(grad_fn: Gradient, own: Own, clock: Clock) -> GradFn:
        def replaying(train: Params, batch: Batch, key: jax.Array, *, terms: bool = True) -> tuple:
            if slots[0] not in batch:  # another method's reference rows: the objective alone
                return grad_fn(train, batch, key, terms=terms)
            pool, count = pooled(batch, slots), rows or len(batch["tokens"])
            if count > len(pool["tokens"]):
                raise RequestError(f"mir: rows is {count}; accepted: up to the {len(pool['tokens'])} candidates")
            new = {k: v for k, v in batch.items() if k not in slots}
            grads, aux = grad_fn(train, new, key, terms=terms)

            def with_old() -> tuple:
                future = grad_fn.ahead(train, grads)
                before, after = (losses(grad_fn.forward(params, pool).nll, pool) for params in (train, future))
                low = before if score == "s1" else jnp.minimum(before, least(own, pool))
                chosen = chosen_rows(after - low, pool, count)
                more, theirs = grad_fn(train, chosen, jax.random.fold_in(key, 3), terms=terms)
                return *joined((grads, aux["terms"], aux["weight"]), (more, theirs["terms"], theirs["weight"])), before

            def alone() -> tuple:
                return grads, aux["terms"], aux["weight"], jnp.full(len(pool["tokens"]), jnp.inf)

            *whole, seen = jax.lax.cond(jnp.any(pool["weight"] > 0), with_old, alone)
            if score == "s2" and "out" in aux:  # for `observe`
                aux = aux | {"out": aux["out"] | {"aux": {**aux["out"]["aux"], name: seen}}}
            return whole[0], aux | {"terms": whole[1], "weight": whole[2]}

        return replaying

    def observe(ctx: Ctx, grads: Params, updates: Params, params: Params) -> Own:
        where = memory.slot_of(ctx.own["fixed"]["slots"], pooled(ctx.batch, slots))
        return {"best": ctx.own["live"]["best"].at[where].min(ctx.out.aux[name], mode="drop")}

    parts: dict[str, Any] = {"init": init, "plan": plan, "end": end, "grad": grad} if capacity else {}
    parts |= {"observe": observe} if capacity and score == "s2" else {}
    return Method(name=name, keeps=Budget(examples=capacity), packs=score == "s1", **parts)


def pooled(batch: Batch, slots: list[str]) -> Batch:
    """The candidates of all streams as one batch [C, ...]."""
    parts = [batch[slot] for slot in slots]
    return {k: jnp.concatenate([p[k] for p in parts]) for k in parts[0]}


def losses(nll: jax.Array, batch: Batch) -> jax.Array:
    """f32[C]: mean nll of every row's targets, by their weights; 0 where a row has none."""
    weight = batch["weight"].astype(jnp.float32)
    total = jnp.sum(jnp.where(weight > 0, weight * nll, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(weight, axis=1), 1e-12)


def chosen_rows(score: jax.Array, pool: Batch, count: int) -> Batch:
    """The ``count`` rows of highest score f32[C]; rows without targets come last, and count nothing."""
    score = jnp.where(jnp.any(pool["weight"] > 0, axis=1), score, -jnp.inf)
    _, chosen = jax.lax.top_k(score, count)  # the lower index first among equals
    return jax.tree.map(lambda x: x[chosen], pool)


def joined(new: tuple, old: tuple) -> tuple:
    """(gradient, terms, weight) of two batches as of one: each by its share of the target weight."""
    a, b = (part[2] + 1e-12 for part in (new, old))
    mix = lambda x, y: ((a * x.astype(jnp.float32) + b * y.astype(jnp.float32)) / (a + b)).astype(x.dtype)  # noqa: E731
    return jax.tree.map(mix, new[0], old[0]), jax.tree.map(mix, new[1], old[1]), new[2] + old[2]


# the least loss of every row in memory so far, for s2


def tables(host: dict[str, Any], capacity: int, old: Own | None) -> Own:
    """The row in every slot, and its least loss: what is known of rows that stay, infinity for the others."""
    rows = memory.slots(host, capacity)
    if old is None:
        return {"fixed": {"slots": rows}, "live": {"best": jnp.full(capacity, jnp.inf)}}
    where = memory.moved(old["host"], host, capacity)
    best = jnp.where(where >= 0, jnp.asarray(old["live"]["best"])[np.maximum(where, 0)], jnp.inf)
    return {"fixed": {"slots": rows}, "live": {"best": best}}


def least(own: Own, pool: Batch) -> jax.Array:
    """f32[C]: the least loss of every candidate so far; infinity where none is known."""
    return own["live"]["best"].at[memory.slot_of(own["fixed"]["slots"], pool)].get(mode="fill", fill_value=jnp.inf)
