"""Prefix tuning: learned keys and values beside the tokens' own, in every layer. Card cft/prefix-tuning.

Li and Liang, ACL 2021 (deep prompts: Liu et al. 2022). softmax(Q [K^P; K]^T) [V^P; V]; see `jaxcl.models.prefix`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.core.paths import is_stacked
from jaxcl.core.types import Method, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError, unknown
from jaxcl.methods.tasks import by_task, check_stages, check_told, live, next_task, of_rows, opened
from jaxcl.models.prefix import MAP, NAMES, OPEN, materialised
from jaxcl.surgery.edit import restart
from jaxcl.surgery.prefixes import check, collapsed, network, of_text, random

STARTS = ("text", "random", "previous")


@method
def prefix_tuning(
    length: int = 10,
    hidden: int = 512,
    start: str = "text",
    per_task: bool = False,
    max_stages: int = 16,
    grow: bool = True,
    name: str = "prefix_tuning",
) -> Method:
    """Freezes the model and trains ``length`` keys and values in each layer: one prefix through all stages.

    start: as keys and values of the first tokens of the stage's ``text``, ``random`` and small, or, by task, those of
    the ``previous`` one (the first begins as text). hidden: width of the network through which they are trained (0:
    none). It begins by adding nothing, at a stage's end what it adds is added for good, and the next stage has a fresh
    one. per_task: each task has its own prefix; the task must be told in training and at test (`jaxcl.til`), and one
    that is not learned, or none, has the bare model. max_stages, grow: room for tasks, which doubles with one new
    compilation, or is refused. Defaults: the paper's, table to text. Raises RequestError for a length below 1, a text
    beyond the context, an unknown start, a negative width, rows without ``task_id``.
    """
    if start not in STARTS:
        raise unknown("start", start, STARTS, where=name)
    if hidden < 0:
        raise RequestError(f"{name}: hidden is {hidden}; accepted: 0 (no network) or more")
    check_stages(max_stages, name)

    def fresh(world: World) -> Params:
        return random(world.spec, length, world.key) if start == "random" else of_text(world, length)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            return first(world)
        if per_task:
            keys = live(world.params, NAMES)
            again = {k: world.params[k] for k in keys} if start == "previous" else fresh(world)
            world, own = next_task(world, own, {k: again[k] for k in keys}, grow, name)
        if not hidden:
            return world, own
        net = network(world.spec, length, hidden, world.key)
        return restart(world, {k: v for k, v in net.items() if k in world.params}), own

    def first(world: World) -> tuple[World, Own]:
        check(world.spec, length, name)
        if taken := live(world.params, NAMES):
            raise KeyTaken("the model has a prefix already", taken[0])
        new = {**fresh(world), **(network(world.spec, length, hidden, world.key) if hidden else {})}
        world = world._replace(params={**world.params, **new})
        if not per_task:
            return world, {"host": {"attached": True}}
        check_told(world, name)
        return opened(world, live(world.params, NAMES), max_stages)

    def mask(world: World, own: Own) -> dict[str, bool]:
        ends = MAP if hidden else NAMES
        return {k: k.rpartition("/")[2] in ends or k.startswith("prefix/") for k in world.params}

    def end(world: World, own: Own) -> tuple[World, Own]:
        return restart(world, collapsed(world.params)), own

    return Method(
        name=name, packs=not per_task, begin=begin, mask=mask, end=end if hidden else None,
        wrap=by_task(name, lambda params: live(params, NAMES), prefixes) if per_task else None,
    )  # fmt: skip


def prefixes(params: Params, share: jax.Array, tasks: jax.Array) -> Params:
    """``params`` in which each row has its own prefix, the network computed, and is told whether it has one."""
    gone = {k for k in params if k.startswith("prefix/") or k.rpartition("/")[2] in MAP}
    rest = {k: v for k, v in params.items() if k not in gone}
    keys = live(params, NAMES)
    own = of_rows({**rest, **materialised(params)}, keys, share, tasks)
    some = jnp.any(share > 0, axis=1)
    sites = {k.rpartition("/")[0]: k for k in keys}
    shape = {s: (params[k].shape[0], len(some)) if is_stacked(k) else some.shape for s, k in sites.items()}
    return {**rest, **own, **{f"{s}/{OPEN}": jnp.broadcast_to(some, shape[s]) for s in sites}}
