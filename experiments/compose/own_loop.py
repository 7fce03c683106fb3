"""The stage loop, copied and changed: a phase ends early, with its best weights, when a held-out loss stops falling.

All slots of all methods work as in `jaxcl.core.loop`. Left out: checkpoints, logs, accounting, and an optimizer that
is carried from one stage to the next. Here: EWC and replay on three stages that a long training would overfit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from unicode_names import held_out, show, stages

from jaxcl import Clock, Experiment, Fixed, Phase, State, decoder, ewc, make_step, replay
from jaxcl.core import compose
from jaxcl.core.between import Between
from jaxcl.core.feed import Feed, lengths
from jaxcl.core.paths import merge, split
from jaxcl.core.view import View
from jaxcl.data.pipeline import phase_steps, pipeline
from jaxcl.evaluate.base import Eval
from jaxcl.metrics.pooling import pooled
from jaxcl.models.spec import tiny


class Early(NamedTuple):
    """checks: a loss on held-out rows for each stage, measured every ``every`` steps; ``patience`` measurements
    without a new lowest end the phase."""

    checks: list[Eval]
    every: int = 10
    patience: int = 3


class Run:
    """After `run`: ``now`` the last world and memories, ``rows`` scores [stages][evals], ``curves`` a list of held-out
    losses for each phase, ``steps`` how many were trained of how many planned."""

    def __init__(self, exp: Experiment, early: Early | None = None):
        self.exp, self.early = exp, early
        self.now = Between(exp, check=lambda: None)
        self.view = View(exp.model, exp.methods, self.now.batch)
        self.compiled: dict[Any, Any] = {}
        self.rows: list[list[float]] = []
        self.curves: list[list[float]] = []
        self.steps: list[tuple[int, int]] = []

    def run(self) -> Run:
        """All stages: `begin`, the votes, `init`; `plan` and the phases; `end`, evaluation."""
        now = self.now
        for i in range(len(self.exp.stages)):
            now.begin(i)
            j = 0
            while j < len(phases := now.plan(j)):  # again at each phase's start: a plan may read what happened
                self.phase(i, j, phases[j])
                j += 1
            now.end()
            clock = Clock.at(sum(n for n, _ in self.steps), i, j)
            self.view.at(now.world.spec, now.world.params, now.device("fixed"), now.device("live"), clock)
            self.rows.append([self.measure(e) for e in self.exp.evals])
        return self

    def phase(self, i: int, j: int, phase: Phase) -> None:
        """One phase, from its weights and memories to the new ones."""
        exp, now, spec = self.exp, self.now, self.now.world.spec
        counted = phase_steps(phase, now.sources, exp.batch_size, seed=(exp.seed, i, j), pack=exp.pack)
        most, needed = lengths(phase, counted)
        train, frozen = split(now.world.params, compose.narrow(now.world.trained, phase))
        tx = phase.tx or exp.tx
        clock = Clock.at(sum(n for n, _ in self.steps), i, j, 0, most)
        state = now.placement.put(State(clock, train, tx.init(train), now.device("live")))
        fixed = Fixed(frozen, now.device("fixed"))
        data = pipeline(
            now.sources, phase.streams, stage=i, phase=j, batch_size=exp.batch_size, steps=needed, seed=exp.seed,
            epochs=phase.epochs, pack=exp.pack,
        )  # fmt: skip
        feed = Feed(data, phase.collect_every, lambda s, batch: now.collect(phase, frozen, s, batch), now.batch)
        step = self.step(spec, phase)
        best, curve, n = state, [], 0
        while n < most:
            state, batch = feed.take(n, state)
            state, _ = step(state, fixed, batch, np.uint32(exp.seed))
            n += 1
            if self.early and (n % self.early.every == 0 or n == most):  # from here: what is changed
                self.view.at(spec, merge(frozen, state.train), fixed.own, state.live, state.clock)
                curve.append(self.measure(self.early.checks[i]))
                best = state if curve[-1] == min(curve) else best
                if len(curve) - 1 - int(np.argmin(curve)) >= self.early.patience:
                    break
        state = best if self.early else state  # to here
        now.world = now.world._replace(params=merge(frozen, state.train))
        for name, live in state.live.items():
            now.owns[name]["live"] = live
        now.after(phase)
        self.curves.append(curve)
        self.steps.append((n, most))

    def step(self, spec: Any, phase: Phase) -> Any:
        """The phase's step, compiled once for all phases like it."""
        exp, key = self.exp, (spec, phase.objective, phase.active, phase.tx)
        if key not in self.compiled:
            made = make_step(exp.model.apply, spec, exp.methods, exp.tx, phase, exp.accumulate, exp.model.head)
            self.compiled[key] = jax.jit(made)
        return self.compiled[key]

    def measure(self, e: Eval) -> float:
        return pooled(e.run(self.view, lambda done, total: None), e.pool)


def main() -> dict[str, Run]:
    """{run: what it left}; prints its losses. Of eight names one is a test, one a check, two train."""
    model = decoder(tiny(layers=1))
    exp = Experiment(
        model=model, params=model.init(model.spec, jax.random.key(0)), stages=stages([2, 6]), evals=held_out([0]),
        methods=[ewc(strength=0.3, rows=None), replay(ratio=0.5)], tx=optax.adam(1e-2), batch_size=16, epochs=40,
    )  # fmt: skip
    found = {"all steps": Run(exp).run(), "early stop": Run(exp, Early(held_out([4]))).run()}
    for name, run in found.items():
        show(name, run.rows, [f"{n:6} of {most} steps" for n, most in run.steps])
    return found


if __name__ == "__main__":
    main()
