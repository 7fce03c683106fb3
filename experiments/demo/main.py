"""`jaxcl demo`: one base, six runs, a table, a report. The same command continues, or says what is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bar import Bar
from jax.experimental.compilation_cache import compilation_cache

from jaxcl import experiment_files
from jaxcl.core.config import as_json
from jaxcl.core.run import train
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.report import report
from jaxcl.report.table import comparison

demo: Any = experiment_files.load(str(Path(__file__).with_name("experiment.py")))


def main(out: str | None = None, cfg: Any = None, runs: Sequence[str] = demo.RUNS, quiet: bool = False) -> int:
    """Trains all ``runs`` in OUT/<run> (default: runs/demo) and writes OUT/report.html. Returns 0."""
    folder, cfg = Path(out or "runs/demo"), cfg or demo.Config()
    bar = Bar({"base": cfg.base_steps} | {run: demo.steps(cfg, run) for run in runs}, quiet)
    paths = [folder / run for run in runs]
    try:
        with shared_compilations():
            bar.part("base")
            base = demo.base(cfg, folder / "base", bar)
            for run, path in zip(runs, paths):
                bar.part(run)
                one = dataclasses.replace(cfg, method=run)
                train(demo.build(one, base), path, name="demo", config=as_json(one), reporter=bar)
    finally:
        bar.close()
    page = report(paths, folder)
    if not quiet:
        bar.console.print(comparison(paths))
    for line in summary(paths):
        bar.say(line)
    bar.say(f"report: {page}")
    return 0


@contextlib.contextmanager
def shared_compilations() -> Iterator[None]:
    """Runs that train the same program compile it once. Ends with the process: nothing stale is ever read."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    if before[names[0]]:  # the user has a cache already
        yield
        return
    with tempfile.TemporaryDirectory(prefix="jaxcl-demo-") as folder:
        try:
            for name, value in zip(names, (folder, 0.0)):
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def summary(paths: Sequence[Path]) -> list[str]:
    """What the first run, sequential, forgot, and how much of it each other run won back."""
    first = read_matrix(paths[0]).rows
    rise = float(np.mean(np.diag(first)[:-1] - first[-1, :-1])) * -1
    lines = [f"{paths[0].name} forgot {rise:.2f} bits per byte: the mean rise on the earlier stages"]
    for path in paths[1:]:
        lines.append(f"  {path.name} won back {won_back(first, read_matrix(path).rows):.0%} of it")
    return lines


def won_back(sequential: np.ndarray, other: np.ndarray) -> float:
    """Share of the rise of ``sequential`` on its earlier stages that ``other`` does not have at the end.

    Rows f64[stages, evals] of losses. 1: as good at the end as sequential was right after each stage.
    """
    learned, end = np.diag(sequential)[:-1], sequential[-1, :-1]
    return float(np.mean(end - other[-1, :-1]) / np.mean(end - learned))
