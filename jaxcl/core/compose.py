"""The laws: how the slots of several methods become one function. One law per slot, see docs/protocol.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcl.core.paths import matches
from jaxcl.core.types import Apply, Clock, Ctx, Method, Own, Phase, Stream, World, weighted_nll
from jaxcl.errors import RequestError

Owner = dict[str, str]
"""{parameter path: name of the method that made it}; every other key belongs to the base."""


def check_names(methods: Sequence[Method]) -> None:
    """Raises RequestError when two methods share a name (they would share their memory)."""
    names = [m.name for m in methods]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two methods are named {name!r}; give one of them another name")


def active(methods: Sequence[Method], phase: Phase) -> list[Method]:
    """The methods whose in-step slots run in this phase."""
    return [m for m in methods if phase.active is None or m.name in phase.active]


def vote(methods: Sequence[Method], world: World, owns: Mapping[str, Own], owner: Owner) -> frozenset[str]:
    """The trained keys: own keys as their method says, base keys unless somebody freezes them.

    Raises RequestError naming the methods when nothing is left to train and nobody learns by `observe`.
    """
    frozen: set[str] = set()
    voters = []
    for m in methods:
        if m.mask is None:
            continue
        says = m.mask(world, owns[m.name])
        no = {k for k, train in says.items() if not train and owner.get(k, m.name) == m.name}
        if no:
            voters.append(m.name)
        frozen |= no
    trained = frozenset(world.params) - frozen
    if not trained and not any(m.observe for m in methods):
        raise RequestError(f"nothing is left to train: {', '.join(voters)} together freeze every parameter")
    return trained


def narrow(trained: frozenset[str], phase: Phase) -> frozenset[str]:
    """What a phase trains of what the votes allow. Raises RequestError when that is nothing."""
    if phase.train is None:
        return trained
    left = frozenset(k for k in trained if matches(k, phase.train))
    if not left:
        raise RequestError(f"phase {phase.name!r} trains {phase.train}, which names none of the trained parameters")
    return left


def fold_plans(methods: Sequence[Method], world: World, owns: Mapping[str, Own], phases: list[Phase]) -> list[Phase]:
    """Every method's `plan` in list order, each seeing what its predecessor left.

    Raises RequestError when two methods set an objective, or when a method opens past rows beyond its `keeps`.
    """
    setter: dict[str, str] = {}
    for m in methods:
        if m.plan is None:
            continue
        objectives, afters = {p.name: p.objective for p in phases}, [None, *(p.after for p in phases)]
        read = [s.rows for p in phases for s in p.streams]
        phases = m.plan(world, owns[m.name], list(phases))
        added: list[Stream] = []
        for p in phases:
            known = [objectives[p.name]] if p.name in objectives else [weighted_nll, *objectives.values()]
            if not any(p.objective is o for o in known):
                if p.name in setter:
                    raise RequestError(
                        f"methods {setter[p.name]!r} and {m.name!r} both set the objective of phase {p.name!r}; "
                        "a phase has one"
                    )
                setter[p.name] = m.name
            added += [s for s in p.streams if not any(s.rows is rows for rows in read)]
        check_keeps(m, added, world)
        phases = [dataclasses.replace(p, by=m.name) if p.after not in afters else p for p in phases]
    for p in phases:
        check_collect(methods, p)
    if not phases:
        raise RequestError(f"no phase is left to train in stage {world.stage}; the plans removed them all")
    return phases


def check_collect(methods: Sequence[Method], phase: Phase) -> None:
    """RequestError unless exactly one method makes the rollouts of a phase that has them."""
    names = [m.name for m in active(methods, phase) if m.collect is not None]
    if phase.collect_every and len(names) != 1:
        who = f"methods {names[0]!r} and {names[1]!r} both" if names else "no method"
        raise RequestError(f"{who} collect the rollouts of phase {phase.name!r}; a phase has one that does")


def check_keeps(m: Method, streams: Sequence[Stream], world: World) -> None:
    """Past rows that ``m`` added against what it declares to keep. Raises RequestError, naming both."""
    stage, keeps = world.stage, m.keeps
    for s in streams:
        if s.stage > stage:
            raise RequestError(f"method {m.name!r} reads stage {s.stage} while stage {stage} is trained")
    past = [s for s in streams if s.stage < stage and isinstance(s.rows, np.ndarray)]
    rows = {(s.stage, int(r)) for s in past for r in s.rows}
    if keeps.all or not rows:
        return
    size = 0 if keeps.bytes is None else sum(world.tools.row_bytes(s) for s, _ in rows)
    many = len(rows) > keeps.examples if keeps.examples is not None else keeps.bytes is None
    if many or (keeps.bytes is not None and size > keeps.bytes):
        shown = f"{len(rows)} rows" + (f" ({size} bytes)" if size else "")
        raise RequestError(f"method {m.name!r} reads {shown} of past stages in stage {stage}, but keeps {keeps}")


def own_of(m: Method, fixed: Mapping[str, Any], live: Mapping[str, Any]) -> Own:
    """The device part of a method's memory, as in-step slots see it."""
    return {"fixed": fixed.get(m.name), "live": live.get(m.name)}


def wrapped(apply: Apply, methods: Sequence[Method], fixed: Mapping, live: Mapping, clock: Clock) -> Apply:
    """The model as training, evaluation and decoding see it: first in the list is innermost."""
    for m in methods:
        if m.wrap is not None:
            apply = m.wrap(apply, own_of(m, fixed, live), clock)
    return apply


def weights(methods: Sequence[Method], ctx: Ctx, owns: Mapping[str, Own]) -> jax.Array:
    """Product of the batch weight and every `weigh`, without a gradient."""
    weight = ctx.batch["weight"]
    for m in methods:
        if m.weigh is not None:
            weight = weight * jax.lax.stop_gradient(m.weigh(ctx._replace(own=owns[m.name])))
    return weight


def terms(methods: Sequence[Method], ctx: Ctx, owns: Mapping[str, Own]) -> dict[str, jax.Array]:
    """All loss terms, named ``method/term``."""
    named: dict[str, jax.Array] = {}
    for m in methods:
        if m.loss is not None:
            named |= {f"{m.name}/{k}": v for k, v in m.loss(ctx._replace(own=owns[m.name])).items()}
    return named
