"""Progressive prompts: each task's prompt stands before those of the tasks before it. Card cft/progressive-prompts.

Razdaibiedina et al., ICLR 2023. Task i is asked behind [P_i; P_i-1; ..; P_1], newest first; only the newest trains; a
past task's outputs stay as they were. All prompts have room from the start and what is not there is masked, so one
program serves every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Apply, Batch, Clock, Method, Outputs, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.methods.prompt_tuning import mask
from jaxcl.methods.tasks import BANK, UNTOLD, check_stages, check_told, full, next_task, opened
from jaxcl.models.prompt import ROWS, VALID, produced
from jaxcl.surgery.edit import restart
from jaxcl.surgery.prompts import check_room, collapsed, drawn, network


@method
def progressive_prompts(
    length: int = 10,
    words: Sequence[int] | None = None,
    hidden: int = 800,
    told: bool = True,
    past: bool = True,
    max_stages: int = 16,
    grow: bool = True,
    name: str = "progressive_prompts",
) -> Method:
    """Freezes the model; every stage trains ``length`` rows before the frozen prompts of the stages before.

    Rows begin as random words' embeddings, or as those of ``words``. hidden: width of the stage's own residual network
    (0: none), see `prompt_tuning`. told: a row has the prompts up to its task, which must be told in training and at
    test (`jaxcl.til`); a task that is not learned, or none, has the bare model. Not told: every row has all prompts
    there are, and what later stages add is felt. past: whether old prompts are seen at all; without them the tasks'
    prompts are independent. max_stages times length positions are taken from the context; a stage more doubles them,
    with one new compilation, or is refused (``grow``). Defaults: the reference code's for T5; its learning rate is 0.3.
    Raises RequestError for a length below 1, prompts beyond the context, a negative width, rows without ``task_id``.
    """
    if hidden < 0:
        raise RequestError(f"{name}: hidden is {hidden}; accepted: 0 (no network) or more")
    check_stages(max_stages, name)

    def fresh(world: World) -> tuple[Params, Params]:
        rows = {ROWS: drawn(world.spec, world.params, length, words, world.key)}
        return rows, network(world.spec, hidden, world.key, silent=False) if hidden else {}

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        rows: Params
        if own is None:
            if length < 1:
                check_room(world.spec, length, 0, name)
            if ROWS in world.params:
                raise KeyTaken("the model has a soft prompt already", ROWS)
            if told:
                check_told(world, name)
            check(world, max_stages)
            rows, net = fresh(world)
            return opened(world._replace(params={**world.params, **rows, **net}), [ROWS], max_stages)
        rows, net = fresh(world)
        world, own = next_task(world, own, rows, grow, name)
        check(world, world.params[ROWS + BANK].shape[0])
        return (restart(world, net) if net else world), own

    def check(world: World, slots: int) -> None:
        tokens = next(world.tools.batches(world.stage, 1))["tokens"].shape[1]
        check_room(world.spec, slots * length, tokens, name)

    def end(world: World, own: Own) -> tuple[World, Own]:
        return restart(world, collapsed(world.params)), own

    def wrap(apply: Apply, own: Own, clock: Clock) -> Apply:
        if not own["fixed"]:  # before the first task there is nothing to choose from
            return apply

        def chained(spec: Any, params: Params, batch: Batch, **kw: Any) -> Outputs:
            if told and "task_id" not in batch:
                raise RequestError(f"method {name!r} {UNTOLD}")
            tasks = own["fixed"]["tasks"]
            task = batch["task_id"] if told else jnp.full(len(batch["tokens"]), tasks - 1)
            rest = {k: v for k, v in params.items() if not k.startswith("prompt/")}
            prompts = full(params[ROWS + BANK], produced(params), tasks)
            rows, there = chain(prompts, task, tasks, past)
            return apply(spec, {**rest, ROWS: rows, VALID: there}, batch, **kw)

        return chained

    return Method(name=name, packs=not told, begin=begin, mask=mask, end=end if hidden else None, wrap=wrap)


def chain(prompts: jax.Array, task: jax.Array, tasks: jax.Array, past: bool) -> tuple[jax.Array, jax.Array]:
    """(rows [B, S p, D], which are there bool [B, S p]) of each row's task i32[B] from all prompts [S, p, D]: its own
    first, then back to the first task's; none where the task is not among the ``tasks`` learned."""
    slots, length, width = prompts.shape
    back = jnp.arange(slots)
    slot = task[:, None] - back
    there = (slot >= 0) & (task < tasks)[:, None] & (past | (back == 0))
    rows = prompts[jnp.clip(slot, 0, slots - 1)].reshape(len(task), slots * length, width)
    return rows, jnp.repeat(there, length, axis=1)
