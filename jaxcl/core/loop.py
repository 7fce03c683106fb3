"""The stage loop. Read it top to bottom; copy it into an experiment when you need another order of things.

A stage: `begin` of all methods in list order, the votes of `mask`, `init` of those without memory, `plan`, the
phases, `end` of all in reverse order, evaluation. Everything between phases is a pure function of what the
journal holds, so that repeating it after a kill is harmless.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from jaxcl.core import compose, journal
from jaxcl.core.between import Between, row_ids
from jaxcl.core.checkpoint import Store
from jaxcl.core.compiled import StepCache
from jaxcl.core.experiment import Experiment
from jaxcl.core.feed import Feed, lengths
from jaxcl.core.measure import Measurements
from jaxcl.core.paths import merge, split
from jaxcl.core.processes import agree, permitted
from jaxcl.core.progress import Reporter
from jaxcl.core.rundir import RunDir
from jaxcl.core.sharding import placed
from jaxcl.core.signals import StopRequest
from jaxcl.core.types import Clock, Params, Phase, State
from jaxcl.core.view import View
from jaxcl.data.pipeline import phase_steps, pipeline
from jaxcl.errors import RunFailed
from jaxcl.surgery.edit import restarted


class Loop:
    """One run of an experiment in a run directory. After `run`, ``now`` holds the last world and memories."""

    def __init__(self, exp: Experiment, rundir: RunDir, reporter: Reporter, stop: StopRequest, config: dict):
        exp.check()
        compose.check_names(exp.methods)
        self.exp, self.dir, self.reporter, self.stop, self.config = exp, rundir, reporter, stop, config
        self.now = Between(exp, stop.check)
        self.compiled = StepCache(exp)
        self.source = dict(self.now.world.params)
        self.store = Store(rundir.checkpoints, jax.process_index())
        self.store.adopt("source", journal.flatten(self.source, "params"))
        self.measure = Measurements(exp, rundir, View(exp.model, exp.methods, self.now.batch), reporter, stop)
        self.opt: Params = {}  # flat, carried over where a phase does not reset it
        self.step = 0  # of the whole run, as of the phase's start

    def run(self) -> None:
        """All stages that are not done yet. Raises Interrupted, RunFailed, RequestError."""
        entry = agree(self._newest())
        at = self._restore(entry) if entry else None
        if at is None:
            self.now.begin(0)
            self.now.plan(0)  # what cannot be trained is refused before anything is written
            permitted(lambda: self.dir.create(self.config))
            self.dir.open_log(0)
            self.measure.start(self.source, self.exp.model.spec)
        for i in range(at.stage if at else 0, len(self.exp.stages)):
            here = at if at is not None and at.stage == i else None
            if here is None or here.kind != "stage":
                self._stage(i, here, begun=at is None and i == 0)
        self.store.wait()
        self.measure.finish(self.compiled.compilations)
        self.dir.close()

    def _newest(self) -> str | None:
        if not self.dir.writes or not self.dir.checkpoints.exists():
            return None
        return journal.newest(self.store, self.reporter.say)

    def _stage(self, i: int, at: journal.At | None, begun: bool) -> None:
        if at is None and not begun:
            self.now.begin(i)
            self.opt = restarted(self.opt, self.now.world.edits)
        j = 0 if at is None else at.phase + (at.kind == "done")
        while j < len(phases := self.now.plan(j)):  # again at each phase's start: a plan may read what happened
            carry = not self.exp.reset_opt or any(not p.reset_opt for p in phases[j + 1 : j + 2])
            here = at if at is not None and at.phase == j and at.kind != "done" else None
            self._phase(i, j, phases[j], here, carry)
            j += 1
        before = len(self.now.world.edits)
        self.now.end()
        self.opt = restarted(self.opt, self.now.world.edits[before:])
        self.measure.row(i, self.now, Clock.at(self.step, i, j, 0, 1))
        self._save(journal.entry_name(i))
        self.store.wait()
        journal.prune(self.store, i, self.exp.keep)

    def _phase(self, i: int, j: int, phase: Phase, at: journal.At | None, carry: bool) -> None:
        exp, now = self.exp, self.now
        begun = journal.entry_name(i, j, phase.name, "begun")
        if at is None:
            self._save(begun)
        counted = phase_steps(phase, now.sources, exp.batch_size, seed=(exp.seed, i, j), pack=exp.pack)
        steps, batches = lengths(phase, counted)
        train, frozen = split(now.world.params, compose.narrow(now.world.trained, phase))
        state = State(Clock.at(self.step, i, j, 0, steps), train, self.opt, now.device("live"))
        state = self.compiled.with_optimizer(now.placement.put(state, copy=True), phase, now.placement)
        now.world, self.opt, train = now.world._replace(params=frozen), {}, {}  # the state owns them now
        data = pipeline(
            now.sources, phase.streams, stage=i, phase=j, batch_size=exp.batch_size, steps=batches, seed=exp.seed,
            epochs=phase.epochs, pack=exp.pack, local=now.placement.rows_here(exp.batch_size),
        )  # fmt: skip
        make = lambda state, batch: now.collect(phase, frozen, state, batch)  # noqa: E731
        feed = Feed(data, phase.collect_every, make, lambda rows: now.placement.share(rows, exp.batch_size))
        if at is not None and at.kind == "step":
            entry = journal.entry_name(i, j, phase.name, "step", at.step)
            arrays = self.store.load(entry, now.place, {})
            state, meta = journal.unflatten_like(state, arrays, "state"), self.store.read(entry)["meta"]
            feed.rollout, feed.made_at = journal.nest(arrays, "rollout"), meta["rollout"]
            feed.data.set_state(meta["data"])
        done = first = int(state.clock.phase_step)
        state, batch = feed.first(done, state)
        fixed = now.fixed(frozen, batch)
        step = self.compiled.get(state, fixed, phase, now.world.spec, now.placement, batch)
        self.reporter.start(f"{exp.stages[i].name} {phase.name}", steps, done)
        started, pending = time.monotonic(), None
        seed = placed(np.uint32(exp.seed), now.placement.replicated)
        while done < steps:
            due, stop = exp.save_every and done % exp.save_every == 0 and done > first, self.stop.poll()
            if due or stop:  # before the next batch is taken, so that state and iterator agree
                self._log(pending, i, phase)
                pending = None
                started = self.measure.lap(i, "train", started)
                entry = journal.entry_name(i, j, phase.name, "step", self.step + done)
                meta = {"begun": begun, "reached": self.step + done, "rollout": feed.made_at, **self._meta()}
                meta["data"] = feed.data.get_state()  # a batch's number, whoever reads which of its rows
                arrays = journal.flatten(state, "state") | journal.flatten(feed.rollout, "rollout")
                self.store.save(entry, arrays, meta)
                if stop:
                    self.store.wait()
                    self.stop.check()
                journal.prune(self.store, i, exp.keep)
            state, batch = feed.take(done, state)
            with jax.transfer_guard("disallow"):  # all that a step reads and writes is on the devices
                state, metrics = step(state, fixed, batch, seed)
            self._log(pending, i, phase)  # of the step before, while this one runs
            pending = (done, metrics, feed.read)
            done += 1
        self._log(pending, i, phase)
        self.reporter.stop()
        self.measure.lap(i, "train", started)
        self.measure.count(phase, steps, i)
        self.step += steps
        now.world = now.world._replace(params=merge(frozen, state.train))
        for name, live in state.live.items():
            now.owns[name]["live"] = live
        self.opt = journal.flatten(state.opt, "opt") if carry else {}
        now.after(phase)
        self._save(journal.entry_name(i, j, phase.name, "done"))

    def _log(self, pending: tuple | None, i: int, phase: Phase) -> None:
        """Fetches a step's metrics, refuses to go on with what is not finite, writes the log."""
        if pending is None:
            return
        done, metrics, batch = pending
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        bad = ", ".join(f"{k}={v}" for k, v in values.items() if not math.isfinite(v))
        if bad:
            self.reporter.stop()
            self.store.wait()
            raise RunFailed(
                f"{bad} in stage {self.exp.stages[i].name!r}, phase {phase.name!r}, step {self.step + done} (items "
                f"{', '.join(row_ids(batch, phase, self.now.sources))}); the last good checkpoint is kept under "
                f"{self.dir.checkpoints}"
            )
        if done % self.exp.log_every == 0:
            self.dir.log({"step": self.step + done, "stage": i, "phase": phase.name, **values})
        self.reporter.update(done + 1, f"loss {values['loss']:.3f}")

    def _meta(self) -> dict[str, Any]:
        self.dir.flush()
        return {"step": self.step, "log_bytes": self.dir.log_bytes, "measured": self.measure.state()}

    def _save(self, entry: str) -> None:
        arrays, meta = self.now.pack(self.opt)
        self.store.save(entry, arrays, {**meta, **self._meta()})

    def _restore(self, entry: str) -> journal.At:
        """Takes world, memories, log and measurements from an entry; a step's state follows in its phase."""
        meta = self.store.read(entry)["meta"]
        at, begun = journal.position(entry), meta.get("begun", entry)
        assert at is not None
        source = journal.flatten(self.source, "params")
        load = lambda place: self.store.load(begun, place, source)  # noqa: E731
        self.opt = self.now.unpack(load, self.store.read(begun)["meta"], at.stage)
        self.step = meta["step"]
        self.dir.create(self.config)
        self.dir.open_log(meta["log_bytes"], meta.get("reached", self.step))
        self.measure.restore(meta["measured"])
        self.reporter.say(f"continuing after {entry}")
        return at
