"""Evaluation between stages and what is written down of it: the accuracy matrix, predictions, accounting."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxcl.core.between import Between
from jaxcl.core.experiment import Experiment
from jaxcl.core.progress import Reporter
from jaxcl.core.rundir import RunDir
from jaxcl.core.signals import Compilations, StopRequest
from jaxcl.core.types import Clock, Own, Params, Phase, World
from jaxcl.core.view import View
from jaxcl.metrics.pooling import pooled


class Measurements:
    """Row 0 before any training, one row after every stage. Files are rewritten whole, so a repeat is harmless."""

    def __init__(self, exp: Experiment, rundir: RunDir, view: View, reporter: Reporter, stop: StopRequest):
        self.exp, self.dir, self.view, self.reporter, self.stop = exp, rundir, view, reporter, stop
        self.row0: list[float | None] | None = None
        self.rows: list[list[float | None]] = []
        self.account: dict[str, Any] = {
            "seconds": [], "steps": 0, "forward_passes": 0, "backward_passes": 0,
            "kept": {}, "parameters": {}, "compilations": {},
        }  # fmt: skip

    def start(self, params: Params, spec: Any) -> None:
        """Measures row 0: the model as it was given, without any method."""
        if self.exp.evals and self.exp.row0:
            self.view.at(spec, params, {}, {}, Clock.at())
            self.row0 = self._evaluate(0, "before training", -1)
        self._write()

    def row(self, stage: int, now: Between, clock: Clock) -> None:
        """Measures every eval on the world after a stage."""
        self._account_memory(now.world, now.owns)
        if self.exp.evals:
            self.view.at(now.world.spec, now.world.params, now.device("fixed"), now.device("live"), clock)
            values = self._evaluate(stage + 1, f"after {self.exp.stages[stage].name}", stage)
        else:
            values = []
        self.rows = [*self.rows[:stage], values]
        self._write()

    def _evaluate(self, row: int, label: str, stage: int) -> list[float | None]:
        started, values = time.monotonic(), []
        for e in self.exp.evals:
            self.reporter.start(f"{label}: {e.id}", e.n)
            items = e.run(self.view, self.reporter.counter(self.stop.check))
            self.reporter.stop()
            if items:  # an eval may have nothing to ask at this stage: its cell is null, without a file
                self.dir.write_predictions(e.id, row, items)
            values.append(pooled(items, e.pool))
        self.dir.measured(row, {e.id: v for e, v in zip(self.exp.evals, values, strict=True)})
        shown = "  ".join(f"{e.id} {v:.4f}" for e, v in zip(self.exp.evals, values, strict=True) if v is not None)
        self.reporter.say(f"{label}: {shown}")
        self.add_seconds(stage, "eval", time.monotonic() - started)
        return values

    # accounting

    def add_seconds(self, stage: int, what: str, seconds: float) -> None:
        """Wall time by stage; stage -1 is before training."""
        table: list[dict[str, Any]] = self.account["seconds"]
        name = self.exp.stages[stage].name if stage >= 0 else None
        entry = next((e for e in table if e["stage"] == name), None)
        if entry is None:
            entry = {"stage": name, "train": 0.0, "eval": 0.0}
            table.append(entry)
        entry[what] = round(entry[what] + seconds, 3)

    def lap(self, stage: int, what: str, started: float) -> float:
        """Adds the time since ``started`` and returns now."""
        now = time.monotonic()
        self.add_seconds(stage, what, now - started)
        return now

    def count(self, phase: Phase, steps: int, stage: int) -> None:
        """Steps and passes (in rows) of a phase, and the past rows it read."""
        self.account["steps"] += steps
        self.account["forward_passes"] += steps * self.exp.batch_size
        self.account["backward_passes"] += steps * self.exp.batch_size
        opened = [s for s in phase.streams if s.stage < stage and isinstance(s.rows, np.ndarray)]
        past = {(s.stage, int(r)) for s in opened for r in s.rows}
        self.account["past_rows_read"] = max(len(past), self.account.get("past_rows_read", 0))

    def _account_memory(self, world: World, owns: Mapping[str, Own]) -> None:
        base = sum(int(np.size(v)) for v in self.exp.params.values())
        total = sum(int(np.size(v)) for v in world.params.values())
        trained = sum(int(np.size(world.params[k])) for k in world.trained if k in world.params)
        self.account["parameters"] = {"base": base, "extra": total - base, "trained": trained}
        if world.notes:
            self.account["notes"] = dict(world.notes)
        for name, own in owns.items():
            size = sum(int(getattr(x, "nbytes", 0)) for x in jax.tree.leaves(own))
            examples = sum(len(v) for k, v in own["host"].items() if k.startswith("rows") and isinstance(v, np.ndarray))
            if counts := own["host"].get("counts"):  # of rows that a method wrote: asked for, accepted, refused
                self.account.setdefault("written", {})[name] = counts
            if size:
                self.account["kept"][name] = {"examples": examples, "bytes": size}

    # files

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON."""
        return {"row0": self.row0, "rows": self.rows, "account": copy.deepcopy(self.account)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continues from the state in a journal entry."""
        self.row0, self.rows, self.account = saved["row0"], saved["rows"], saved["account"]
        self._write()

    def matrix(self) -> dict[str, Any]:
        """The matrix file's content; rows not measured yet are left out."""
        evals = [
            {
                "id": e.id,
                "metric": e.metric,
                "higher_is_better": e.higher_is_better,
                "range": [b if math.isfinite(b) else None for b in e.range],
                "n": e.n,
                "role": e.role,
                **({"pool": e.pool} if e.pool else {}),
                **({"hparams": dict(e.hparams)} if e.hparams else {}),
            }
            for e in self.exp.evals
        ]
        stages = [{"name": s.name, "evals": list(s.evals)} for s in self.exp.stages]
        row0 = self.row0 if self.row0 is not None else [None] * len(evals)
        chance = [e.chance for e in self.exp.evals]
        random = {"random": chance} if any(c is not None for c in chance) else {}
        return {"schema": 1, "stages": stages, "evals": evals, "row0": row0, "rows": self.rows, **random}

    def _write(self) -> None:
        self.dir.write("matrix.json", self.matrix())

    def finish(self, compilations: Compilations) -> None:
        """metrics.json: every metric under its convention's name, and the accounting."""
        from jaxcl.metrics.score import score_matrix

        counted = {"train_step": compilations.by_name.get("train_step", 0), "all": compilations.total}
        self.account["compilations"] = counted
        self._write()
        found = score_matrix(self.matrix(), self.dir.path) if self.exp.evals and self.dir.writes else {}
        self.dir.write("metrics.json", {**found, "accounting": self.account})
