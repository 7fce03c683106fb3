"""A stage's step as the loop would take it: methods' host code, data pipeline, compiled program and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcl.core.between import Between
from jaxcl.core.compiled import StepCache
from jaxcl.core.experiment import Experiment
from jaxcl.core.feed import Feed, lengths
from jaxcl.core.paths import split
from jaxcl.core.types import Batch, Clock, State
from jaxcl.core.view import View
from jaxcl.data.pipeline import pipeline

Change = Callable[[Between], None]
"""What is done to a stage's world before it is measured, such as filling a memory."""


def as_it_is(now: Between) -> None:
    """No change."""


class Running:
    """Calling it takes one training step of the stage and waits for its end.

    The stages before are gone through without their steps: begin and end of every method, so that memories, banks and
    teachers have the size that they have in ``stage``. ``compiled`` may be shared by several stages, as in a run.
    """

    def __init__(self, exp: Experiment, stage: int, compiled: StepCache, steps: int, change: Change = as_it_is):
        now = at_stage(exp, stage)
        change(now)
        phases = now.plan(0)
        phase = next((p for p in phases if p.name == "train"), phases[-1])
        train, frozen = split(now.world.params, now.world.trained)
        state = State(Clock.at(0, stage, 0, 0, steps), train, {}, now.device("live"))
        state = compiled.with_optimizer(now.placement.put(state, copy=True), phase, now.placement)
        _, batches = lengths(phase, steps)
        data = pipeline(
            now.sources, phase.streams, stage=stage, batch_size=exp.batch_size, steps=batches, seed=exp.seed,
            epochs=phase.epochs, pack=exp.pack,
        )  # fmt: skip
        make = lambda state, batch: now.collect(phase, frozen, state, batch)  # noqa: E731
        self.feed = Feed(data, phase.collect_every, make, now.batch)
        self.state, batch = self.feed.first(0, state)
        self.fixed = now.fixed(frozen, batch)
        self.step = compiled.get(self.state, self.fixed, phase, now.world.spec, now.placement, batch)
        self.seed, self.done = np.uint32(exp.seed), 0

    def __call__(self) -> None:
        self.state, batch = self.feed.take(self.done, self.state)
        self.state, metrics = self.step(self.state, self.fixed, batch, self.seed)
        jax.block_until_ready((self.state, metrics))
        self.done += 1

    @property
    def program(self) -> Any:
        """The compiled step, for its memory."""
        return self.step


class Looking:
    """Calling it asks the model of a stage, with all that methods wrap around it, for the nll of one batch."""

    def __init__(self, exp: Experiment, stage: int, change: Change = as_it_is):
        now = at_stage(exp, stage)
        change(now)
        self.view = View(exp.model, exp.methods, now.batch)
        self.view.at(now.world.spec, now.world.params, now.device("fixed"), now.device("live"), Clock.at(stage=stage))
        source = now.sources[stage]
        examples = [source[i % len(source)] for i in range(exp.batch_size)]
        self.batch: Batch = jax.tree.map(lambda *x: np.stack(x), *examples)

    def __call__(self) -> None:
        jax.block_until_ready(self.view.call(nll, self.batch))

    program = None


def nll(apply: Any, head: Any, spec: Any, params: Any, batch: Batch) -> jax.Array:
    return apply(spec, params, batch).nll


def at_stage(exp: Experiment, stage: int) -> Between:
    """The world as the stage begins."""
    now = Between(exp, lambda: None)
    for i in range(stage):
        now.begin(i)
        now.plan(0)
        now.end()
    now.begin(stage)
    return now
