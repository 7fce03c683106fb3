"""What makes a step smaller, in the order to try: from what costs nothing to what costs time.

A change is a function on an experiment, as its file would write it. `suggest` compiles with one more at a time until
the step fits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.core.experiment import Experiment
from jaxcl.plan.report import Plan, plan

Build = Callable[[], Experiment]


class Change(NamedTuple):
    """apply(exp, plan) -> (the changed experiment, what is changed), or None where it cannot be. why: what it saves and
    costs. state: whether it makes weights and memories smaller, too. again: whether it may be made several times."""

    apply: Callable[[Experiment, Plan], tuple[Experiment, str] | None]
    why: str
    state: bool = False
    again: bool = False


def fsdp(exp: Experiment, found: Plan) -> tuple[Experiment, str] | None:
    if "fsdp" in found["mesh"] or len(found["mesh"]) > 1:
        return None
    return dataclasses.replace(exp, mesh={"fsdp": -1}, rules=None), "mesh={'fsdp': -1}"


def remat(exp: Experiment, found: Plan) -> tuple[Experiment, str] | None:
    if getattr(exp.model.spec, "remat", "block") == "block":
        return None
    return respec(exp, remat="block"), "remat='block'"


def bf16_base(exp: Experiment, found: Plan) -> tuple[Experiment, str] | None:
    """Where the base is frozen; weights that train in bf16 lose small updates."""
    frozen = found["state"]["frozen"] > found["state"]["trained"]
    if not frozen or getattr(exp.model.spec, "param_dtype", "bfloat16") == "bfloat16":
        return None
    params = {k: v.astype(jnp.bfloat16) for k, v in exp.params.items()}
    return dataclasses.replace(respec(exp, param_dtype="bfloat16"), params=params), "param_dtype='bfloat16'"


def accumulate(exp: Experiment, found: Plan) -> tuple[Experiment, str] | None:
    """Twice the micro-batches, while each has rows for every chip that rows are spread over."""
    parts = 2 * exp.accumulate
    if exp.batch_size % (parts * found["batch"]["spread"]):
        return None
    return dataclasses.replace(exp, accumulate=parts), f"accumulate={parts}"


def respec(exp: Experiment, **values: Any) -> Experiment:
    """The experiment with other values in its model's spec."""
    return dataclasses.replace(exp, model=exp.model._replace(spec=dataclasses.replace(exp.model.spec, **values)))


CHANGES: tuple[Change, ...] = (
    Change(fsdp, "weights, moments and memories are split over all chips, and gathered layer by layer", state=True),
    Change(bf16_base, "the frozen base takes half the bytes; adapters cannot be merged into it", state=True),
    Change(remat, "activations inside a block are computed again: one more forward pass"),
    Change(accumulate, "fewer rows at a time; weights are gathered once for each part", again=True),
)


def advice(build: Build, found: Plan) -> list[dict[str, str]]:
    """{"change", "why"} of what an experiment that does not fit can still change, untried, in order."""
    left = [(c, what_of(build, [c], found)) for c in CHANGES if helps(c, found)]
    return [{"change": what, "why": c.why} for c, what in left if what]


def suggest(build: Build, topology: str, found: Plan, stage: int | None, say: Callable[[str], None]) -> Plan:
    """The plan with the changes that made it fit, or all that there are, under ``changes``; every one is compiled."""
    made: list[Change] = []
    tried, names = found, {}
    for change in CHANGES:
        while not tried["fits"] and helps(change, tried) and (what := what_of(build, [*made, change], found)):
            made.append(change)
            names[change.apply] = {"change": what, "why": change.why}
            say("trying " + ", ".join(n["change"] for n in names.values()))
            tried = plan(functools.partial(rebuilt, build, tuple(made), found), topology, stage)
            if not change.again:
                break
    return tried | {"changes": list(names.values()), "unchanged": found}


def helps(change: Change, found: Plan) -> bool:
    """Whether a change is worth a try: where weights and memories alone are too large, only what makes them smaller."""
    return change.state or sum(found["state"].values()) <= found["memory"]["capacity"]


def least_chips(found: Plan) -> int:
    """Chips over which weights, optimizer and memories would take half of the memory, were they split evenly."""
    held = sum(v for k, v in found["state"].items() if k != "batch") * found["devices"]
    return math.ceil(held / (0.5 * found["memory"]["capacity"]))


def changed(exp: Experiment, steps: Sequence[Change], found: Plan) -> tuple[Experiment, str]:
    """The experiment after the changes, and what the last one is; ``""`` where one cannot be made."""
    what = ""
    for change in steps:
        made = change.apply(exp, found)
        if made is None:
            return exp, ""
        exp, what = made
    return exp, what


def rebuilt(build: Build, steps: Sequence[Change], found: Plan) -> Experiment:
    return changed(build(), steps, found)[0]


def what_of(build: Build, steps: Sequence[Change], found: Plan) -> str:
    """What the last of the changes is after the others; the experiment is built for nothing but to look."""
    seen: list[str] = []

    def look() -> Any:
        seen.append(changed(build(), steps, found)[1])
        return 0

    jax.eval_shape(look)
    return seen[0]
