"""Joint training: stage t trains on the rows of stages 1..t. The upper reference, not a continual method."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxcl.core.types import ALL, Method, Own, Phase, Stream, World, method


@method
def joint(name: str = "joint") -> Method:
    """Adds every row of every past stage to each phase's main streams; the rows add steps."""

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        past = tuple(
            Stream(s, np.arange(world.tools.size(s), dtype=np.int64)) for s in range(world.stage)
        )
        return [dataclasses.replace(p, streams=p.streams + past) for p in phases]

    return Method(name=name, keeps=ALL, plan=plan)
