"""Dark experience replay: past rows with the logits that the model had when it had just learned them.

Card cft/knowledge-distillation-lwf, stored logits; Buzzega et al., NeurIPS 2020. L + alpha * mean (z - z_stored)^2 +
beta * nll of the same rows; with beta 0 it is DER, else DER++ (which draws the rows of its second term anew). Of a
language model's vocabulary the largest logits are stored, and the student is compared at these.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Budget, Ctx, Method, Own, Params, Phase, World, method
from jaxcl.errors import RequestError
from jaxcl.losses.distillation import masked_mean
from jaxcl.losses.positions import before
from jaxcl.methods import memory
from jaxcl.methods.agem import with_reference


@method
def der(
    alpha: float = 0.5,
    beta: float = 0.5,
    k: int = 64,
    capacity: int = 256,
    policy: str = "reservoir",
    seed: int = 0,
    name: str = "der",
) -> Method:
    """Adds alpha * mean squared distance from the stored logits, and beta * mean nll, of as many past rows as new ones.

    k: logits stored for each target of a row, the largest; with k the vocabulary's size it is the paper's distance.
    capacity: rows held over all stages, with 8 k bytes a target; policy, seed: of the memory, as in `replay`. Logits
    are taken at the end of a row's stage, without dropout, and stay as they are. A step costs one more forward and
    backward pass once there is a memory. Raises RequestError for a negative alpha, beta or capacity, k below 1, an
    unknown policy, rollouts.
    """
    if alpha < 0 or beta < 0 or k < 1:
        raise RequestError(f"{name}: alpha {alpha}, beta {beta}, k {k}; accepted: alpha >= 0, beta >= 0, k >= 1")
    memory.check(name, policy, capacity=capacity)

    def largest(forward: Any, train: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        logits = forward.logits(train, forward(train, batch), before(batch)).astype(jnp.float32)
        value, index = jax.lax.top_k(logits, min(k, logits.shape[-1]))
        return {"value": value, "index": index}

    def init(world: World) -> Own:
        own = memory.empty(world)
        like = world.tools.call(largest, next(world.tools.batches(world.stage, 1)), world.key)
        stored = {part: np.zeros((capacity, *x.shape[1:]), x.dtype) for part, x in like.items()}
        return own | {"fixed": {"slots": memory.slots(own["host"], capacity), **stored}}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        return [with_reference(p, name, memory.by_stage(own["host"])) for p in phases]

    def end(world: World, own: Own) -> tuple[World, Own]:
        new = memory.remember(world, own, policy, capacity, seed)
        slots, was = memory.slots(new["host"], capacity), memory.moved(own["host"], new["host"], capacity)
        stored = {part: np.asarray(host(own["fixed"][part]))[np.maximum(was, 0)] for part in ("value", "index")}
        come = np.flatnonzero((slots[:, 0] == world.stage) & (was < 0))
        at = 0
        for batch in world.tools.kept(world.stage, slots[come, 1].tolist()):
            made = {part: host(x) for part, x in world.tools.call(largest, batch, world.key).items()}
            real = np.flatnonzero(batch["row"] >= 0)
            for part, table in stored.items():
                table[come[at : at + len(real)]] = made[part][real]
            at += len(real)
        return world, new | {"fixed": {"slots": slots, **stored}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        batch = ctx.batch[name]
        if "old_logp" in batch:
            raise RequestError(f"{name}: knows the rows' own answers, not rollouts; accepted: phases without them")

        def old() -> tuple[jax.Array, jax.Array]:
            assert ctx.head is not None
            out = ctx.model(ctx.spec, ctx.params, batch, train=True, key=jax.random.fold_in(ctx.key, 1))
            logits = ctx.head(ctx.spec, ctx.params, out.hidden, before(batch)).astype(jnp.float32)
            slot, fixed = memory.slot_of(ctx.own["fixed"]["slots"], batch), ctx.own["fixed"]
            now = jnp.take_along_axis(logits, fixed["index"][slot], axis=-1)
            apart = jnp.mean(jnp.square(now - fixed["value"][slot]), axis=-1)
            weight = batch["weight"]
            nll = jnp.sum(weight * out.nll) / jnp.maximum(jnp.sum(weight), 1.0)
            return masked_mean(apart, weight > 0), nll

        none = lambda: (jnp.zeros((), jnp.float32),) * 2  # noqa: E731  in the first stage nothing is computed
        distance, nll = jax.lax.cond(jnp.any(batch["weight"] > 0), old, none)
        return {"logits": alpha * distance, **({"old": beta * nll} if beta else {})}

    parts: dict[str, Any] = {"init": init, "plan": plan, "end": end, "loss": loss}
    idle = not capacity or not (alpha or beta)
    return Method(name=name, keeps=Budget(examples=capacity), packs=False, **({} if idle else parts))
