"""The stage loop, copied and changed: a phase ends early, with its best weights, when a held-out loss stops falling.

All slots of all methods work as in `jaxcl.core.loop`. Left out: checkpoints, logs, accounting, and an optimizer that
is carried from one stage to the next. Here: EWC and replay on three stages that a long training would overfit.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import Clock, Experiment, Fixed, Phase, Stage, State, decoder, ewc, make_step, replay
from jaxcl.core import compose
from jaxcl.core.between import Between
from jaxcl.core.feed import Feed, lengths
from jaxcl.core.paths import merge, split
from jaxcl.core.view import View
from jaxcl.data.pipeline import batches, phase_steps, pipeline
from jaxcl.data.stage import text_source
from jaxcl.evaluate.base import score
from jaxcl.evaluate.nll import text_nll
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer


class Early(NamedTuple):
    """checks: held-out rows for each stage, measured every ``every`` steps; ``patience`` measurements without a new
    lowest loss end the phase."""

    checks: list[Any]
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
            self.rows.append([score(e.run(self.view, lambda at, of: None)) for e in self.exp.evals])
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
                curve.append(self.held_out(self.early.checks[i]))
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

    def held_out(self, source: Any) -> float:
        """Nats a token, through the methods' wraps."""
        parts = [self.view.call(total, batch) for batch in batches(source, None, self.exp.batch_size)]
        loss, weight = np.sum(np.array(parts, np.float64), axis=0)
        return float(loss / weight)


def total(apply: Any, head: Any, spec: Any, params: Any, batch: Any) -> jax.Array:
    """f32[2]: the weighted nll of a batch and its weight."""
    nll = apply(spec, params, batch).nll
    return jnp.stack([jnp.sum(batch["weight"] * nll), jnp.sum(batch["weight"])])


SCRIPTS = {"cyrillic": range(0x400, 0x500), "ethiopic": range(0x1200, 0x1380), "braille": range(0x2800, 0x2900)}


def experiment(model: Any, epochs: float) -> tuple[Experiment, Early]:
    """Names of the characters of three scripts: of eight one is a test, one a check, two train."""
    words, stages, evals, checks = ByteTokenizer(), [], [], []
    for script, codes in SCRIPTS.items():
        names = [n for n in (unicodedata.name(chr(c), "") for c in codes) if n]
        stages.append(Stage(script, text_source(script, names[2::8] + names[6::8], words, window=48), (script,)))
        checks.append(text_source(script, names[4::8], words, window=48))
        evals.append(text_nll(script, [{"id": n, "text": n} for n in names[::8]], words, window=48))
    return Experiment(
        model=model, params=model.init(model.spec, jax.random.key(0)), stages=stages, evals=evals,
        methods=[ewc(strength=0.3, rows=None), replay(ratio=0.5)], tx=optax.adam(1e-2), batch_size=16, epochs=epochs,
    ), Early(checks)  # fmt: skip


def main() -> dict[str, Run]:
    """{run: what it left}; prints its scores, nats a byte of the test names."""
    exp, early = experiment(decoder(tiny(layers=1)), epochs=40)
    done = {"all steps": Run(exp).run(), "early stop": Run(exp, early).run()}
    for label, run in done.items():
        print(f"{label:18}" + "".join(f"{script:>10}" for script in SCRIPTS) + f"{'steps':>12}")
        for script, row, (n, most) in zip(SCRIPTS, run.rows, run.steps):
            print(f"  after {script:10}" + "".join(f"{x:10.2f}" for x in row) + f"{n:7} of {most}")
    return done


if __name__ == "__main__":
    main()
