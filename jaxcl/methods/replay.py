"""Experience replay: rows of past stages mixed into the current one. Card cft/experience-replay.

Memory: indices of rows, chosen at the end of each stage by reservoir sampling (Vitter 1985) or class-balanced
(Chrysakis and Moens 2020); reading: dataset mixing, the union of the new rows and a share of each old stage (the
rule of TRACE and CT0, a ratio, and of CITB, a count).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxcl.core.types import Budget, Method, Own, Phase, Stream, World, method
from jaxcl.data.reservoir import Memory, class_balanced, reservoir
from jaxcl.errors import RequestError, unknown

POLICIES = {"reservoir": reservoir, "class_balanced": class_balanced}


@method
def replay(
    ratio: float | None = None,
    count: int | None = None,
    capacity: int = 4096,
    policy: str = "reservoir",
    seed: int = 0,
    name: str = "replay",
) -> Method:
    """Mixes stored rows of every past stage into the phases of the current one; every new row is still seen.

    ratio: rows drawn of an old stage per epoch, as a share of that stage's size (default 0.1, TRACE); or count:
    rows of each old stage per epoch (10 or 50 in CITB). Drawn rows that the memory holds fewer of repeat.
    capacity: rows held over all stages. policy: ``reservoir`` or ``class_balanced``. seed: of the memory.
    Raises RequestError for a ratio outside [0, 1], a negative count or capacity, an unknown policy.
    """
    if ratio is not None and count is not None:
        raise RequestError(f"replay takes ratio or count, not both (ratio={ratio}, count={count})")
    ratio = 0.1 if ratio is None and count is None else ratio
    if ratio is not None and not 0 <= ratio <= 1:
        raise RequestError(f"replay: ratio is {ratio}; accepted: 0 to 1")
    for key, value in (("count", count or 0), ("capacity", capacity)):
        if value < 0 or value != int(value):
            raise RequestError(f"replay: {key} is {value}; accepted: a whole number of at least 0")
    if policy not in POLICIES:
        raise unknown("policy", policy, POLICIES, where="replay")

    def init(world: World) -> Own:
        return {"host": _store(Memory.empty(), [])}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        old = tuple(_stream(s, rows, world) for s, rows in sorted(_by_stage(own["host"]).items()))
        old = tuple(s for s in old if s.share > 0)
        return [dataclasses.replace(p, streams=p.streams + old) for p in phases] if old else phases

    def _stream(stage: int, rows: np.ndarray, world: World) -> Stream:
        wanted = count if ratio is None else ratio * world.tools.size(stage)
        return Stream(stage, rows, share=(wanted or 0) / len(rows))

    def end(world: World, own: Own) -> tuple[World, Own]:
        memory, starts = _load(own["host"])
        starts = [*starts, memory.seen]  # the stream of all stages is one; this stage starts here
        labels = [str(label) for label in world.tools.labels(world.stage)]
        return world, {"host": _store(POLICIES[policy](memory, labels, capacity, seed), starts)}

    keeps = Budget(examples=capacity)
    return Method(name=name, keeps=keeps, init=init, plan=plan, end=end, hparams={"ratio": ratio})


def _store(memory: Memory, starts: list[int]) -> dict[str, Any]:
    plain = {k: v for k, v in dataclasses.asdict(memory).items() if k not in ("items", "labels")}
    classes = sorted(set(memory.labels.tolist()))
    codes = np.array([classes.index(c) for c in memory.labels.tolist()], np.int64)
    arrays = {"rows": memory.items, "codes": codes} if len(memory.items) else {}
    return {**plain, "classes": classes, "starts": starts, **arrays}


def _load(host: dict[str, Any]) -> tuple[Memory, list[int]]:
    rows = host.get("rows", np.zeros(0, np.int64))
    labels = np.array([host["classes"][c] for c in host.get("codes", ())], np.str_)
    seen = tuple((str(c), int(n)) for c, n in host["class_seen"])
    return Memory(rows, labels, int(host["seen"]), seen, tuple(host["full"])), list(host["starts"])


def _by_stage(host: dict[str, Any]) -> dict[int, np.ndarray]:
    """{stage: sorted int64 rows of it in memory}."""
    memory, starts = _load(host)
    stage = np.searchsorted(np.array(starts, np.int64), memory.items, side="right") - 1
    return {int(s): np.sort(memory.items[stage == s] - starts[s]) for s in np.unique(stage)}
