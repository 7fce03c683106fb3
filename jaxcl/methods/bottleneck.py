"""Bottleneck adapters: Houlsby's, Pfeiffer's, parallel ones; one set, or one a task (AdapterCL). Card
cft/bottleneck-adapters.

Houlsby et al. 2019; Pfeiffer et al. 2020; He et al. 2022; AdapterCL: Madotto et al. 2021, whose router takes the
adapter under which the prompt is least surprising. See `jaxcl.models.bottleneck`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Apply, Batch, Clock, Method, Outputs, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError, unknown
from jaxcl.methods.decoder_only import decoder_only
from jaxcl.methods.perplexity import least_surprised
from jaxcl.methods.tasks import UNTOLD, check_stages, check_told, live, next_task, of_rows, opened, slots_of, weights
from jaxcl.models.bottleneck import PARALLEL, SEQUENTIAL
from jaxcl.surgery.bottlenecks import PLACES, check, fresh, norm_deltas, scales

ROUTERS = ("perplexity",)
NAMES = (*SEQUENTIAL, *PARALLEL, "scale_delta")


@method
def bottleneck(
    width: int = 64,
    style: str = "houlsby",
    norms: bool = False,
    scale: float = 4.0,
    per_task: bool = False,
    router: str | None = None,
    max_stages: int = 16,
    grow: bool = True,
    name: str = "bottleneck",
) -> Method:
    """Freezes the model and trains bottlenecks of ``width`` units: one set through all stages.

    style: ``houlsby`` after attention and MLP, ``pfeiffer`` after the MLP, ``parallel`` beside the MLP, times
    ``scale``. They change nothing at first. norms: the norms' scales train too, as a change of their own that goes with
    the adapters, so that tasks do not share it. per_task: each task has its own set, and must be told in training and
    at test (`jaxcl.til`); a task that is not learned, or none, has the bare model. router ``perplexity``: with
    per_task, nothing is told at test; the prompt is run under each task's set, and the one that gives it the least
    perplexity answers. One decision a prompt: a cache holds it. max_stages, grow: room for tasks, which doubles with
    one new compilation, or is refused. Defaults: Houlsby's; scale is He et al.'s. Raises RequestError for a width above
    the model's, an unknown style or router, a router without per_task, a scale of 0, rows without ``task_id``.
    """
    if style not in PLACES:
        raise unknown("style", style, PLACES, where=name)
    if router is not None and router not in ROUTERS:
        raise unknown("router", router, ROUTERS, where=name)
    if router is not None and not per_task:
        raise RequestError(f"{name}: router {router!r} has one set to choose from; accepted: with per_task")
    if scale <= 0:
        raise RequestError(f"{name}: scale is {scale}; accepted: above 0")
    check_stages(max_stages, name)

    def trainable(world: World) -> Params:
        made = fresh(world.spec, style, width, world.key)
        return {**made, **(norm_deltas(world.params) if norms else {})}

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            return first(world)
        if not per_task:
            return world, own
        keys = live(world.params, NAMES)
        anew = trainable(world)
        return next_task(world, own, {k: anew[k] for k in keys}, grow, name)

    def first(world: World) -> tuple[World, Own]:
        check(world.spec, width, name)
        if router is not None:
            decoder_only(world.spec, name, "gives prompts no perplexity for a router")
        made = {**trainable(world), **scales(world.spec, style, scale)}
        for key in sorted(made.keys() & world.params.keys()):
            raise KeyTaken(f"the model has {key!r} already", key)
        world = world._replace(params={**world.params, **made})
        if not per_task:
            return world, {"host": {"attached": True}}
        if router is None:
            check_told(world, name)
        return opened(world, live(world.params, NAMES), max_stages)

    def mask(world: World, own: Own) -> dict[str, bool]:
        train = set(live(world.params, NAMES))
        return {k: k in train for k in world.params}

    def wrap(apply: Apply, own: Own, clock: Clock) -> Apply:
        if not own["fixed"]:  # before the first task there is nothing to choose from
            return apply

        tasks = own["fixed"]["tasks"]

        def under(spec: Any, params: Params, batch: Batch, task: jax.Array, **kw: Any) -> Outputs:
            keys = live(params, NAMES)
            fields = {**batch, "task": task}
            share = weights(fields, slots_of(params, keys), tasks, field="task")
            return apply(spec, {**params, **of_rows(params, keys, share, tasks)}, batch, **kw)

        def chosen(spec: Any, params: Params, batch: Batch, *, cache: Any = None, **kw: Any) -> Outputs:
            held = f"router/{name}/task"
            if cache is not None and held in cache:
                return under(spec, params, batch, cache[held], cache=cache, **kw)
            task = given(batch, router is None)
            if task is not None:
                return under(spec, params, batch, task, cache=cache, **kw)
            if router is None:
                raise RequestError(f"method {name!r} {UNTOLD}")
            task = least_surprised(under, spec, params, batch, tasks)
            out = under(spec, params, batch, task, cache=cache, **kw)
            return out if cache is None else out._replace(cache={**out.cache, held: task})

        return chosen

    return Method(name=name, packs=not per_task, begin=begin, mask=mask, wrap=wrap if per_task else None)


def given(batch: Batch, told: bool) -> jax.Array | None:
    """i32[B], the rows' tasks where they are known: told, or, with a router, the stage of rows that are trained on."""
    if told:
        if "bank_weight" in batch:
            return jnp.zeros(len(batch["tokens"]), jnp.int32)
        return batch.get("task_id")
    return batch.get("stage")
