"""Experience replay: rows of past stages mixed into the current one. Card cft/experience-replay.

Memory: indices of rows, chosen at the end of each stage by reservoir sampling (Vitter 1985) or class-balanced
(Chrysakis and Moens 2020); reading: dataset mixing, the union of the new rows and a share of each old stage (the
rule of TRACE and CT0, a ratio, and of CITB, a count).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxcl.core.types import Budget, Method, Own, Phase, Stream, World, method
from jaxcl.errors import RequestError
from jaxcl.methods import memory


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
    memory.check("replay", policy, count=count or 0, capacity=capacity)

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        old = tuple(stream(s, rows, world) for s, rows in memory.by_stage(own["host"]).items())
        old = tuple(s for s in old if s.share > 0)
        return [dataclasses.replace(p, streams=p.streams + old) for p in phases] if old else phases

    def stream(stage: int, rows: np.ndarray, world: World) -> Stream:
        wanted = count if ratio is None else ratio * world.tools.size(stage)
        return Stream(stage, rows, share=(wanted or 0) / len(rows))

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, memory.remember(world, own, policy, capacity, seed)

    keeps = Budget(examples=capacity)
    return Method(name=name, keeps=keeps, init=memory.empty, plan=plan, end=end, hparams={"ratio": ratio})
