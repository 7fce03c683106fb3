"""`jaxcl evaluate`: row 0 alone, what a model does on an experiment's evals before it is trained on anything of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxcl.core.between import Between
from jaxcl.core.bucket import place
from jaxcl.core.experiment import Experiment
from jaxcl.core.measure import Measurements
from jaxcl.core.processes import permitted
from jaxcl.core.progress import Reporter
from jaxcl.core.run import facts_of, identity_of, opened
from jaxcl.core.rundir import RunDir
from jaxcl.core.signals import Compilations, StopRequest
from jaxcl.core.view import View
from jaxcl.errors import RequestError


def evaluate_experiment(name_or_path: str, overrides: Sequence[str], data: str | None, out: str | None) -> int:
    """Measures an experiment's model untrained; returns 0. Raises JaxclError with the exit status otherwise."""
    exp, folder, name, config = opened(name_or_path, overrides, data, out, "-untrained")
    evaluate(exp, folder, name=name, config=config)
    return 0


def evaluate(
    exp: Experiment, out: Path, *, name: str = "run", config: Any = None, reporter: Reporter | None = None
) -> None:
    """Writes a run directory whose matrix has row 0 and no other. Methods are left out: nothing of theirs is there yet.

    Raises RequestError where ``out`` holds something else or the experiment has no evals.
    """
    if not exp.evals:
        raise RequestError(f"experiment {name!r} has no evals; nothing can be measured")
    exp, reporter = dataclasses.replace(exp, methods=(), row0=True), reporter or Reporter(quiet=jax.process_index() > 0)
    rundir = RunDir(place(out), jax.process_index())
    identity = identity_of(exp, name, config)
    try:
        permitted(lambda: rundir.check(identity))
        finished = rundir.read("metrics.json") is not None
        if finished:
            reporter.say(f"{out} is finished; its numbers are in metrics.json")
            return
        permitted(lambda: rundir.create({**identity, **facts_of(exp)}))  # all have looked before the first writes
        rundir.open_log(0)
        _measure(exp, rundir, reporter)
    finally:
        rundir.close()
    reporter.say(f"done: {out}")


def _measure(exp: Experiment, rundir: RunDir, reporter: Reporter) -> None:
    compilations = Compilations()
    with StopRequest() as stop:
        try:
            now = Between(exp, stop.check)
            measure = Measurements(exp, rundir, View(exp.model, (), now.batch), reporter, stop)
            measure.start(now.world.params, exp.model.spec)
            measure.finish(compilations)
        finally:
            reporter.stop()
            compilations.close()
