"""(IA)^3: keys, values and hidden units of the MLPs rescaled by learned vectors. Card cft/ia3.

Liu et al., NeurIPS 2022. K <- l_k K, V <- l_v V at the projections' outputs (bias included, before rotary positions),
and l_ff on what ``down`` reads. l = 1 + d with d = 0 at first: weight decay pulls l to 1, and the step before any
training is the base model's bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.paths import sites
from jaxcl.core.types import Method, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.methods.tasks import by_task, check_stages, check_told, live, next_task, of_rows, opened
from jaxcl.surgery.edit import restart
from jaxcl.surgery.scales import folded

NAMES = ("in_delta", "out_delta")


@method
def ia3(
    outputs: Sequence[str] = ("attn/k", "attn/v"),
    inputs: Sequence[str] = ("mlp/down",),
    merged: bool = False,
    per_task: bool = False,
    max_stages: int = 16,
    grow: bool = True,
    name: str = "ia3",
) -> Method:
    """Freezes the base and trains one vector at each site: of its output units (``outputs``), or its input units.

    The same vectors train on through all stages; merged: at a stage's end they are multiplied into the kernels in
    float32 and start at 1 again, so that l is the product over stages; per_task: each task has its own, and the task
    must be told in training and at test (`jaxcl.til`). A task that is not learned, or none, has the base model.
    max_stages, grow: room for tasks, which doubles with one new compilation, or is refused. Raises RequestError for an
    unknown site, merged together with per_task, weights that are not float32 to merge into, rows without ``task_id``.
    """
    if merged and per_task:
        raise RequestError("ia3: merged and per_task are both true; accepted: one of them, what is merged serves all")
    check_stages(max_stages, name)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            world = world._replace(params={**world.params, **ones(world.params, outputs, inputs)})
            if not per_task:
                return world, {"host": {"attached": True}}
            check_told(world, name)
            return opened(world, vectors(world.params), max_stages)
        return next_task(world, own, restarted(world.params), grow, name) if per_task else (world, own)

    def end(world: World, own: Own) -> tuple[World, Own]:
        fresh = restarted(world.params)
        for key in fresh:
            kernel = key.rpartition("/")[0] + "/kernel"
            if world.params[kernel].dtype != jnp.float32:
                found = world.params[kernel].dtype
                raise RequestError(f"ia3: merging into {kernel!r} of {found} loses small changes; accepted: float32")
        return restart(world._replace(params=folded(world.params, fresh)), fresh), own

    return Method(
        name=name, packs=not per_task, begin=begin, mask=mask, end=end if merged else None,
        wrap=by_task(name, vectors, of_each_row) if per_task else None,
    )  # fmt: skip


def mask(world: World, own: Own) -> dict[str, bool]:
    """Only the live vectors train."""
    train = set(vectors(world.params))
    return {k: k in train for k in world.params}


def vectors(params: Iterable[str]) -> list[str]:
    """The keys of the live vectors, sorted."""
    return live(params, NAMES)


def of_each_row(params: Params, share: jax.Array, tasks: jax.Array) -> Params:
    """``params`` in which each row has its own vectors."""
    return {**params, **of_rows(params, vectors(params), share, tasks)}


def ones(params: Params, outputs: Sequence[str], inputs: Sequence[str]) -> Params:
    """{site/out_delta, site/in_delta: zeros f32[units]} for l = 1. KeyTaken where a site has one already."""
    fresh: Params = {}
    for targets, delta, axis in ((outputs, "out_delta", -1), (inputs, "in_delta", -2)):
        for site in sites(params, targets):
            key, shape = f"{site}/{delta}", params[site + "/kernel"].shape
            if key in params:
                raise KeyTaken(f"{site!r} is rescaled already", key)
            fresh[key] = jnp.zeros((*shape[:-2], shape[axis]), jnp.float32)
    if not fresh:
        raise RequestError("ia3: outputs and inputs are both empty; accepted: at least one site")
    return fresh


def restarted(params: Mapping[str, Any]) -> Params:
    """The live vectors at 1 again."""
    return {k: jnp.zeros_like(params[k]) for k in vectors(params)}
