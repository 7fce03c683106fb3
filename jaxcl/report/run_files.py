"""Reading run directories for a report, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Matrix, load_json, read_matrix

HEADLINES = ("aa", "fgt_max", "bwt_over_T_minus_1", "learning_accuracy", "zero_shot_gain")
_NOTHING_YET = Matrix((), (), np.zeros(0), np.zeros((0, 0)))
_MAX_LOG = 256 << 20


class Logged(NamedTuple):
    """A line of log.jsonl. loss: the objective, without what methods add to it, where the line tells them apart."""

    step: int
    loss: float
    stage: int


class Run(NamedTuple):
    """One run directory. score: the document of `score_matrix`; bounds f64[2, 1 + rows, evals]: the interval of every
    cell over its test items, NaN where there is none; alone: the stage's name where this run trains on one stage of the
    stream that the others learn whole."""

    name: str
    path: Path
    config: dict[str, Any]
    matrix: Matrix
    score: dict[str, Any]
    accounting: dict[str, Any]
    log: list[Logged]
    bounds: np.ndarray = np.zeros((2, 1, 0))
    alone: str | None = None

    @property
    def measured(self) -> bool:
        return bool(self.matrix.evals)

    @property
    def whole(self) -> bool:
        """Whether it has been measured and learns the stream, not one stage of it."""
        return self.measured and self.alone is None

    @property
    def state(self) -> str | None:
        """None for a finished run, else how far it came."""
        if not self.measured:
            return "partial: nothing has been evaluated yet"
        done, stages = len(self.matrix.rows), len(self.matrix.stages)
        if not done and self.accounting:  # `jaxcl evaluate` ends like this
            return "measured before training only"
        return f"partial: {done} of {stages} stages are done" if self.matrix.partial else None

    @property
    def joint(self) -> bool:
        """Whether this is joint training of the stream."""
        made = self.config.get("methods")
        return isinstance(made, dict | list) and "joint" in made

    @property
    def methods(self) -> str:
        made = self.config.get("methods")
        return " + ".join(map(str, made)) if isinstance(made, dict | list) else ""

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """{metric: value, convention, papers, and reason or interval}, the mean deltas of drift among them."""
        deltas = self.score.get("drift", {}).get("mean_delta", {}).values()
        return self.score.get("metrics", {}) | {d["name"]: d for d in deltas if "name" in d}

    def metric(self, name: str) -> dict[str, Any]:
        """One of the numbers; without a value where this run has none of that name."""
        return self.numbers.get(name, {"value": None, "reason": "not among the evals of this run"})


def read_run(path: Path, name: str) -> Run:
    """A run directory, without its score. Raises RequestError on what is absent or malformed, with file and line."""
    if not path.is_dir():
        raise RequestError(f"no run directory: {path}; accepted: one with config.json and matrix.json")
    config = _object(path / "config.json")
    log = _log(path / "log.jsonl")
    if not (path / "matrix.json").is_file():
        if not config:
            raise RequestError(f"{path} holds no run; accepted: a directory with config.json and matrix.json")
        return Run(name, path, config, _NOTHING_YET, {}, {}, log)
    accounting = _object(path / "metrics.json").get("accounting", {})
    if not isinstance(accounting, dict):
        shown = type(accounting).__name__
        raise RequestError(f"{path / 'metrics.json'}: accounting is {shown}; accepted: an object")
    matrix = read_matrix(path)
    return Run(name, path, config, matrix, {}, accounting, log, no_bounds(matrix))


def no_bounds(m: Matrix) -> np.ndarray:
    """The intervals of a matrix without predictions: all NaN."""
    return np.full((2, 1 + len(m.rows), len(m.evals)), np.nan)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises RequestError where a run is given twice."""
    parts = [p.resolve().parts for p in paths]
    if len(set(parts)) < len(parts):
        twice = next(str(p) for i, p in enumerate(paths) if parts[i] in parts[:i])
        raise RequestError(f"run {twice} is given twice; accepted: every run once")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    found = load_json(path)
    if not isinstance(found, dict):
        raise RequestError(f"{path} is {type(found).__name__}; accepted: a JSON object")
    return found


def _log(path: Path) -> list[Logged]:
    """Every logged step with a finite loss. A last line without its end, as a kill leaves it, is skipped."""
    out: list[Logged] = []
    if not path.is_file():
        return out
    if (size := path.stat().st_size) > _MAX_LOG:
        raise RequestError(f"{path} has {size} bytes; accepted: at most {_MAX_LOG}")
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            loss = record.get("objective", record.get("loss", math.nan))
            entry = Logged(int(record["step"]), float(loss), int(record.get("stage", 0)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise RequestError(f"{path}, line {number}: accepted: an object with step and loss") from None
        if math.isfinite(entry.loss):
            out.append(entry)
    return out
