"""Learning without forgetting: the model of the stage before teaches. Card cft/knowledge-distillation-lwf.

Hinton et al. 2015; Li and Hoiem 2016. Token-level forward KL at the answers' positions, on the new rows, the
replayed ones (another method's `plan` brings them), or both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.distillation import kl, kl_top, masked_mean
from jaxcl.losses.positions import before

TEACHERS = ("snapshot", "topk")
ROWS = ("new", "old", "all")


@method
def lwf(
    strength: float = 1.0,
    temperature: float = 2.0,
    teacher: str = "snapshot",
    rows: str = "all",
    k: int = 16,
    name: str = "lwf",
) -> Method:
    """Adds strength * mean over answer tokens of T^2 KL(teacher || student).

    teacher: ``snapshot`` keeps the trained parameters as they were at the end of the last stage (with adapters that is
    only the adapter; frozen weights are shared) and runs them beside the student, from the second stage on;
    ``topk`` asks the teacher once, as the stage begins, and keeps its ``k`` largest logits for every new row.
    rows: on ``new`` rows (LwF; all that ``topk`` can do), ``old`` ones (replayed or pseudo-old), or ``all``.
    Defaults: T 2, weight 1 (TRACE, LAMOL_KD). The warm-up of a new head has no counterpart here: there is one head.
    Raises RequestError for a negative strength, a temperature that is not positive, unknown teacher or rows, k < 1.
    """
    if strength < 0 or temperature <= 0 or k < 1:
        wanted = "accepted: strength >= 0, temperature > 0, k >= 1"
        raise RequestError(f"lwf: strength {strength}, temperature {temperature}, k {k}; {wanted}")
    for value, known, what in ((teacher, TEACHERS, "teacher"), (rows, ROWS, "rows")):
        if value not in known:
            raise unknown(what, value, known, where="lwf")
    if teacher == "topk" and rows == "old":
        raise RequestError("lwf: teacher 'topk' knows the new rows only; use rows 'new' or 'all', or a snapshot")

    def largest(forward: Any, train: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        logits = forward.logits(train, forward(train, batch), before(batch))
        value, index = jax.lax.top_k(logits[0].astype(jnp.float32), min(k, logits.shape[-1]))
        return {"value": value, "index": index}

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        """Asks the teacher, which the model still is, about this stage's rows."""
        return world, ({"fixed": {"asked": world.tools.each(largest, world.key)}} if own else {})

    def init(world: World) -> Own:
        if teacher == "topk":
            return {"fixed": {"asked": world.tools.each(largest, world.key, 0)}}
        return {"fixed": {"teacher": snapshot(world)}}

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, {"fixed": {"teacher": snapshot(world)}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        assert ctx.head is not None
        at, batch = before(ctx.batch), ctx.batch
        if teacher == "topk" and "old_logp" in batch:
            raise RequestError("lwf: teacher 'topk' knows the rows' own answers, not rollouts; use a snapshot")
        new = (batch["stage"] == ctx.clock.stage)[:, None]
        wanted = {"new": new, "old": ~new, "all": jnp.ones_like(new)}[rows]
        mask = (ctx.weight > 0) & (wanted & new if teacher == "topk" else wanted)
        student = ctx.head(ctx.spec, ctx.params, ctx.out.hidden, at)

        def taught() -> jax.Array:
            if teacher == "topk":
                row = jnp.maximum(batch["row"], 0)
                index, value = (ctx.own["fixed"]["asked"][part][row] for part in ("index", "value"))
                return masked_mean(kl_top(index, value, student, temperature), mask)
            params = jax.lax.stop_gradient({**ctx.params, **ctx.own["fixed"]["teacher"]})
            out = ctx.model(ctx.spec, params, batch)
            assert ctx.head is not None
            return masked_mean(kl(ctx.head(ctx.spec, params, out.hidden, at), student, temperature), mask)

        # One compilation, and no teacher to pay for, in the first stage.
        distance = jax.lax.cond(ctx.clock.stage > 0, taught, lambda: jnp.zeros((), jnp.float32))
        return {"distillation": strength * distance}

    turn: dict[str, Any] = {"begin": begin} if teacher == "topk" else {"end": end}
    parts: dict[str, Any] = {"init": init, "loss": loss, **turn} if strength else {}
    return Method(name=name, kinds={"teacher": "value"}, packs=teacher == "snapshot", **parts)


def snapshot(world: World) -> Params:
    """The trained parameters as they are now."""
    return {k: world.params[k] for k in sorted(world.trained)}
