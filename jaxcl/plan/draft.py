"""A step's state without its arrays: the stage loop run under a trace, so that an 8B model costs no memory.

`build`, `begin`, `init`, `plan` and `end` are the experiment's own and the methods' own; only what they compute is
never computed. What the weights and memories look like in a later stage (a bank, a Fisher, a teacher) is what the
methods themselves make of it, not a second description of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl.core import compose
from jaxcl.core.between import Between
from jaxcl.core.experiment import Experiment
from jaxcl.core.paths import split
from jaxcl.core.sharding import Placement
from jaxcl.core.types import Clock, Fixed, Phase, State, World
from jaxcl.data.pipeline import pipeline
from jaxcl.errors import RequestError

TRACED = (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError)
"""What JAX raises where host code asks for the numbers of an array that has none."""


class Draft(NamedTuple):
    """What the step of a stage (from 0) is compiled from: shapes with shardings, and everything static."""

    stage: int
    exp: Experiment
    state: State
    fixed: Fixed
    batch: Any
    phase: Phase
    spec: Any
    placement: Placement


class Unplaced(Placement):
    """A placement that knows where arrays belong and moves none."""

    def put(self, tree: Any, *, copy: bool = False) -> Any:
        return jax.tree.map(jax.numpy.asarray, tree)

    def batch(self, batch: Any) -> Any:
        return batch


class Paper(Between):
    """The stages on paper. Random keys are numbers all the same: host code draws rows by them."""

    def _placement(self, spec: Any, params: Any) -> Placement:
        return Unplaced(self.mesh, self.exp.model.axes(spec, params), self.exp.rules)

    def given(self, n: int, slot: int) -> World:
        with jax.ensure_compile_time_eval():
            return super().given(n, slot)


def draft(build: Callable[[], Experiment], mesh_of: Callable[[Experiment], Mesh], stage: int) -> Draft:
    """The first phase of a stage (from 0) as the loop would train it. ``build`` runs under a trace.

    Raises RequestError: fewer stages; a method whose host code needs the numbers of weights; a phase of rollouts.
    """
    kept: dict[str, Any] = {}

    def stages() -> tuple[Any, Any]:
        exp = build()
        exp.check()
        compose.check_names(exp.methods)
        if not 0 <= stage < len(exp.stages):
            raise RequestError(f"--stage {stage}: accepted: 0 to {len(exp.stages) - 1}, the experiment's stages")
        now = Paper(exp, lambda: None, mesh_of(exp))
        for i in range(stage):
            now.begin(i)
            now.plan(0)
            now.end()
        now.begin(stage)
        phase = now.plan(0)[0]
        if phase.collect_every:
            raise RequestError(f"phase {phase.name!r} trains on rollouts, whose shapes are known once they are made")
        train, frozen = split(now.world.params, compose.narrow(now.world.trained, phase))
        opt = (phase.tx or exp.tx).init(train)
        state = State(Clock.at(stage=stage, phase_len=2), train, opt, now.device("live"))
        kept.update(exp=exp, phase=phase, spec=now.world.spec, placement=now.placement)
        kept["batch"] = one_batch(exp, now, phase)
        return state, now.fixed(frozen, kept["batch"])

    try:
        state, fixed = jax.eval_shape(stages)
    except TRACED as e:
        line = str(e).splitlines()[0]
        raise RequestError(
            f"between stages a method needs the numbers of arrays, which a plan does not have ({line}); "
            "accepted: --stage 0, the first stage"
        ) from e
    place = kept["placement"]
    shapes = {"state": place.abstract(state), "fixed": place.abstract(fixed)}
    return Draft(stage=stage, **{**kept, **shapes, "batch": with_shardings(kept["batch"], place)})


def one_batch(exp: Experiment, now: Between, phase: Phase) -> Mapping[str, Any]:
    """A host batch of the phase as the loop's own pipeline makes it."""
    data = pipeline(
        now.sources, phase.streams, stage=now.world.stage, batch_size=exp.batch_size, steps=1, seed=exp.seed,
        epochs=phase.epochs, pack=exp.pack, prefetch=0,
    )  # fmt: skip
    return next(data)


def with_shardings(batch: Any, place: Placement) -> Any:
    """The batch's shapes, rows over the data axis as `Placement.batch` puts them."""
    parts = int(np.prod([place.mesh.shape[a] for a in place.rows.spec if a is not None]))

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        even = np.ndim(x) and np.shape(x)[0] % parts == 0
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place.rows if even else place.replicated)

    return jax.tree.map(shape, batch)
