"""From rows to rollouts: prompts, sampled responses, and the policy they are held against. For PPO and its relatives.

A rollout is a batch like any other (its targets are the response's tokens, its weights their mask), so that penalties,
distillation and weighing of other methods work on it. Rows that a method nested in the batch, such as a memory's for
its reference gradient, become rollouts too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Own, Params, Phase, World
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.policy import k3, masked_mean

REFERENCES = ("initial", "previous", "ema")
OF_A_ROW = ("tokens", "segments", "positions", "targets_at", "weight", "log")


class Sampling(NamedTuple):
    """How responses are drawn. max_new: their most tokens; stop_ids: end marks, part of the response; prompt: most
    tokens of a row that are its prompt (None: all before its targets)."""

    max_new: int
    stop_ids: tuple[int, ...] = ()
    prompt: int | None = None


def respond(forward: Any, train: Params, rows: Batch, key: jax.Array, how: Sampling) -> tuple[Batch, jax.Array]:
    """(rollouts, responses i32[B,N]) of the policy at temperature 1, N = max_new.

    Rollouts are T + N tokens wide and have targets_at i32[B,N] and weight f32[B,N] of the response; masked rows
    (without any weight) have none. What else the rows have, source and row among it, stays.
    """
    extra = {k: v for k, v in plain(rows).items() if k not in OF_A_ROW}
    starts = prompt_lengths(rows, how.prompt)
    response, length = forward.generate(
        train, rows["tokens"], starts, max_new=how.max_new, stop_ids=how.stop_ids, temperature=1.0, key=key, batch=extra
    )
    length = jnp.where(starts > 0, jnp.minimum(length + 1, how.max_new), 0)  # the end mark is an action like others
    width = rows["tokens"].shape[1] + how.max_new
    place = jnp.broadcast_to(jnp.arange(width), (len(starts), width))
    after = place - starts[:, None]
    padded = jnp.pad(rows["tokens"], ((0, 0), (0, how.max_new)))
    new = jnp.take_along_axis(response, jnp.clip(after, 0, how.max_new - 1), axis=1)
    inside = after < length[:, None]
    step = jnp.arange(how.max_new)
    mask = step < length[:, None]
    batch = {
        "tokens": jnp.where(after < 0, padded, jnp.where(inside, new, 0)),
        "segments": inside.astype(jnp.int32),
        "positions": jnp.where(inside, place, 0),
        "targets_at": jnp.where(mask, starts[:, None] + step, 0),
        "weight": mask.astype(jnp.float32),
    }
    return {**extra, **batch}, response


def prompt_lengths(rows: Batch, most: int | None) -> jax.Array:
    """i32[B]: tokens before a row's first target, at most ``most``; 0 for masked rows."""
    width = rows["tokens"].shape[1]
    at = rows.get("targets_at", jnp.broadcast_to(jnp.arange(width), rows["tokens"].shape))
    first = jnp.min(jnp.where(rows["weight"] > 0, at, width), axis=1)
    return jnp.where(first < width, first if most is None else jnp.minimum(first, most), 0)


def plain(batch: Batch) -> Batch:
    """The batch without what is nested in it."""
    return {k: v for k, v in batch.items() if not isinstance(v, dict)}


def nested(make: Callable[[Batch, jax.Array], Batch], rows: Batch, key: jax.Array) -> dict[str, Batch]:
    """``make(rows, key)`` of each batch nested in the rows, by its name, without a log."""
    out: dict[str, Batch] = {}
    for i, (into, inner) in enumerate(sorted(rows.items()), 1):
        if isinstance(inner, dict) and "tokens" in inner:
            made = make(inner, jax.random.fold_in(key, i))
            out[into] = {k: v for k, v in made.items() if k != "log"}
    return out


def measured(raw: jax.Array, logp: jax.Array, ref: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """What the log gets of rollouts, means over the real ones, f32[B] each: ``reward`` as given, ``kl`` from the
    reference (k3, nats a response), ``response_tokens``."""
    kl = jnp.sum(mask * k3(logp, ref), axis=1)
    means = {"reward": raw, "kl": kl, "response_tokens": jnp.sum(mask, axis=1)}
    return {k: jnp.full(len(raw), masked_mean(v, real(mask))) for k, v in means.items()}


def real(mask: jax.Array) -> jax.Array:
    """f32[B]: 1 for rollouts, 0 for what masked rows became."""
    return (jnp.sum(mask, axis=1) > 0).astype(jnp.float32)


# the reference policy


def snapshot(world: World, which: str) -> Params:
    """The policy as it is now. ``initial`` is all of it, so that no later merge or bank can enter; what never changes
    is the model's own array and costs nothing. Else the trained parameters: what is frozen is the stage's."""
    keys = world.params if which == "initial" else world.trained
    return {k: world.params[k] for k in sorted(keys) if not k.startswith("value_head/")}


def hold(world: World, which: str) -> Own:
    """The part of a memory that holds the reference: fixed, or live where it moves."""
    return {"live" if which == "ema" else "fixed": {"reference": snapshot(world, which)}}


def held(own: Own) -> Params:
    """The reference in a memory."""
    found = own["live"] if "reference" in (own["live"] or {}) else own["fixed"]
    return found["reference"]


def advance(world: World, own: Own) -> tuple[World, Own]:
    """`end` under ``previous``: the policy now is the next stage's reference. Edits carry it through surgeries."""
    return world, {**own, "fixed": {**own["fixed"], "reference": snapshot(world, "previous")}}


def averaging(decay: float) -> Callable[[Ctx, Params, Params, Params], Any]:
    """`observe` under ``ema``: reference <- decay reference + (1 - decay) policy, after every step."""

    def observe(ctx: Ctx, grads: Params, updates: Params, params: Params) -> Any:
        live = ctx.own["live"]
        old = live["reference"]
        new = {k: (params[k] + updates[k] if k in params else ctx.params[k]).astype(v.dtype) for k, v in old.items()}
        return {**live, "reference": {k: decay * v + (1.0 - decay) * new[k] for k, v in old.items()}}

    return observe


def following(which: str, decay: float, name: str) -> dict[str, Any]:
    """The slots by which the reference follows the policy. Raises RequestError for an unknown one."""
    if which not in REFERENCES:
        raise unknown("reference", which, REFERENCES, where=name)
    slots: dict[str, dict[str, Any]] = {"previous": {"end": advance}, "ema": {"observe": averaging(decay)}}
    return slots.get(which, {})


# what the method does around it


def check(name: str, *, whole: dict, positive: dict, share: dict, weight: dict) -> None:
    """Raises RequestError unless every number (None: not given) is in the range of its group, which are {name: number}:
    whole numbers of at least 1, numbers above 0, from 0 to 1, from 0 on."""
    groups: tuple[tuple[str, Callable[[float], bool], dict[str, Any]], ...] = (
        ("a whole number of at least 1", lambda v: v >= 1 and v == int(v), whole),
        ("a number above 0", lambda v: v > 0, positive),
        ("0 to 1", lambda v: 0 <= v <= 1, share),
        ("0 or more", lambda v: v >= 0, weight),
    )
    for accepted, fits, numbers in groups:
        for what, value in numbers.items():
            if value is not None and not fits(value):
                raise RequestError(f"{name}: {what} is {value}; accepted: {accepted}")


def planned(
    name: str, world: World, own: Own, phases: list[Phase], how: Sampling, rewards: int, which: str | None
) -> list[Phase]:
    """Refuses, before anything is trained, what the rollouts of these phases would stumble over.

    Raises RequestError: dropout, prompt and response beyond the model's context, a stage without a reward, parameters
    that the reference policy does not know, a phase ``which`` that does not exist.
    """
    rate = getattr(world.spec, "adapter_dropout", 0.0)
    if rate:
        raise RequestError(f"{name}: adapter dropout is {rate}; list {name!r} behind the adapter, or give it 0")
    width = next(iter(world.tools.batches(world.stage, 1)))["tokens"].shape[1]
    context = getattr(world.spec, "context", None)
    if context is not None and width + how.max_new > context:
        raise RequestError(
            f"{name}: a window of {width} tokens and a response of up to {how.max_new} exceed the model's context of "
            f"{context}; accepted: max_new up to {context - width}"
        )
    if 1 < rewards <= world.stage:
        raise RequestError(f"{name}: stage {world.stage} has no reward; accepted: one for all stages, or one for each")
    new = sorted(k for k in world.trained - held(own).keys() if not k.startswith("value_head/"))
    if new:
        raise RequestError(
            f"{name}: {new[0]!r} is trained in stage {world.stage}, but the reference policy was taken without it; "
            "accepted: reference 'initial', or the same parameters trained in every stage"
        )
    names = [p.name for p in phases]
    if which is not None and which not in names:
        raise unknown("phase", which, names, where=name)
    return [p for p in phases if which in (None, p.name)]


def without_dropout(world: World) -> World:
    """The world with adapter dropout off: with it the ratio of new and old policy would not start at 1."""
    if not getattr(world.spec, "adapter_dropout", 0.0):
        return world
    return world._replace(spec=dataclasses.replace(world.spec, adapter_dropout=0.0))
