"""Prompt tuning: learned rows before the tokens of a frozen model. Card cft/prompt-tuning.

Lester, Al-Rfou, Constant, EMNLP 2021. [P; E(x)]: the tokens' positions follow the prompt's, see `jaxcl.models.prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.core.types import Method, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError, unknown
from jaxcl.methods.tasks import by_task, check_stages, check_told, next_task, of_rows, opened
from jaxcl.models.prompt import ROWS, VALID, produced
from jaxcl.surgery.edit import restart
from jaxcl.surgery.prompts import check_room, collapsed, drawn, network

STARTS = ("vocabulary", "previous")


@method
def prompt_tuning(
    length: int = 100,
    words: Sequence[int] | None = None,
    hidden: int = 0,
    per_task: bool = False,
    start: str = "vocabulary",
    max_stages: int = 16,
    grow: bool = True,
    name: str = "prompt_tuning",
) -> Method:
    """Freezes the model and trains ``length`` rows before its tokens: one prompt through all stages.

    Rows begin as random words' embeddings; words: token ids to begin with, as of class labels. hidden: width of a
    residual network through which the prompt is trained (800 in the papers; 0: none); at a stage's end what it makes is
    the prompt, and it adds nothing until the next stage, which has a fresh one. per_task: each task has its own prompt,
    which begins as the ``vocabulary`` or the ``previous`` task's; the task must be told in training and at test
    (`jaxcl.til`), and one that is not learned, or none, has the bare model. max_stages, grow: room for tasks, which
    doubles with one new compilation, or is refused. Defaults: the paper's; its learning rate is 0.3 with Adafactor, and
    1e-4 hardly moves a prompt. Raises RequestError for a length below 1 or beyond the context, an unknown start or
    word, a negative width, rows without ``task_id``.
    """
    if start not in STARTS:
        raise unknown("start", start, STARTS, where=name)
    if hidden < 0:
        raise RequestError(f"{name}: hidden is {hidden}; accepted: 0 (no network) or more")
    check_stages(max_stages, name)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            return first(world)
        again = start == "previous" or not per_task
        net = network(world.spec, hidden, world.key, silent=again) if hidden else {}
        if not per_task:
            return (restart(world, net) if net else world), own
        rows = world.params[ROWS] if again else drawn(world.spec, world.params, length, words, world.key)
        world, own = next_task(world, own, {ROWS: rows}, grow, name)
        return (restart(world, net) if net else world), own

    def first(world: World) -> tuple[World, Own]:
        tokens = next(world.tools.batches(world.stage, 1))["tokens"]
        check_room(world.spec, length, tokens.shape[1], name)
        if ROWS in world.params:
            raise KeyTaken("the model has a soft prompt already", ROWS)
        fresh = {ROWS: drawn(world.spec, world.params, length, words, world.key)}
        fresh |= network(world.spec, hidden, world.key, silent=False) if hidden else {}
        world = world._replace(params={**world.params, **fresh})
        if not per_task:
            return world, {"host": {"attached": True}}
        check_told(world, name)
        return opened(world, [ROWS], max_stages)

    def end(world: World, own: Own) -> tuple[World, Own]:
        return restart(world, collapsed(world.params)), own

    return Method(
        name=name, packs=not per_task, begin=begin, mask=mask, end=end if hidden else None,
        wrap=by_task(name, lambda params: [ROWS], prompts) if per_task else None,
    )  # fmt: skip


def mask(world: World, own: Own) -> dict[str, bool]:
    """Only the live prompt and its network train."""
    return {k: k == ROWS or k.startswith("prompt/mlp_") for k in world.params}


def prompts(params: Params, share: jax.Array, tasks: jax.Array) -> Params:
    """``params`` in which each row has its own prompt, its network computed, and is told whether it has one."""
    rest = {k: v for k, v in params.items() if not k.startswith("prompt/mlp_")}
    rows = of_rows({**rest, ROWS: produced(params)}, [ROWS], share, tasks)[ROWS]
    return {**rest, ROWS: rows, VALID: jnp.broadcast_to(jnp.any(share > 0, axis=1)[:, None], rows.shape[:2])}
