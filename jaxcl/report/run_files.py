"""Reading run directories for a report, finished or not, and checking that they can stand side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Matrix, load_json, read_matrix
from jaxcl.metrics.score import score_matrix

HEADLINES = ("aa", "fgt_max", "bwt_over_T_minus_1", "learning_accuracy", "zero_shot_gain")
_NOTHING_YET = Matrix((), (), np.zeros(0), np.zeros((0, 0)))
_MAX_LOG = 256 << 20


class Run(NamedTuple):
    """One run directory. score: the document of `score_matrix`; losses: (step, loss) pairs of log.jsonl."""

    name: str
    path: Path
    config: dict[str, Any]
    matrix: Matrix
    score: dict[str, Any]
    accounting: dict[str, Any]
    losses: list[tuple[int, float]]

    @property
    def measured(self) -> bool:
        return bool(self.matrix.evals)

    @property
    def state(self) -> str | None:
        """None for a finished run, else how far it came."""
        if not self.measured:
            return "partial: nothing has been evaluated yet"
        done, stages = len(self.matrix.rows), len(self.matrix.stages)
        return f"partial: {done} of {stages} stages are done" if self.matrix.partial else None

    @property
    def joint(self) -> bool:
        """Whether this is joint training of the stream."""
        made = self.config.get("methods")
        return isinstance(made, dict | list) and "joint" in made

    @property
    def methods(self) -> str:
        made = self.config.get("methods")
        return " + ".join(made) if isinstance(made, dict | list) else ""


def read_runs(paths: Sequence[Path], *, intervals: bool = True) -> list[Run]:
    """The runs, in order, with names that differ. Raises RequestError on what is absent, malformed or not
    comparable (other stages or evals than the first).

    A finished joint run among them is the ``joint`` baseline of those that bring none, so that their
    intransigence is defined: its score on each eval right after the stage that teaches it."""
    runs = [_read(path, name) for path, name in zip(paths, _names(paths))]
    measured = [r for r in runs if r.measured]
    for other in measured[1:]:
        _same_stream(measured[0], other)
    joint = next((_joint_baseline(r) for r in measured if r.joint and not r.state), None)
    return [_scored(r, None if r.joint else joint, intervals) for r in runs]


def _joint_baseline(r: Run) -> np.ndarray:
    own = [r.matrix.learned(e.id) for e in r.matrix.evals]
    return np.array([np.nan if t is None else r.matrix.rows[t, i] for i, t in enumerate(own)])


def _scored(r: Run, joint: np.ndarray | None, intervals: bool) -> Run:
    if not r.measured:
        return r
    matrix = r.matrix if joint is None or r.matrix.joint is not None else r.matrix._replace(joint=joint)
    return r._replace(matrix=matrix, score=score_matrix(matrix, r.path if intervals else None))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [p.resolve().parts for p in paths]
    if len(set(parts)) < len(parts):
        twice = next(str(p) for i, p in enumerate(paths) if parts[i] in parts[:i])
        raise RequestError(f"run {twice} is given twice; accepted: every run once")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise RequestError(f"no run directory: {path}; accepted: one with config.json and matrix.json")
    config = _object(path / "config.json")
    if not (path / "matrix.json").is_file():
        if not config:
            raise RequestError(f"{path} holds no run; accepted: a directory with config.json and matrix.json")
        return Run(name, path, config, _NOTHING_YET, {}, {}, _losses(path / "log.jsonl"))
    accounting = _object(path / "metrics.json").get("accounting", {})
    return Run(name, path, config, read_matrix(path), {}, accounting, _losses(path / "log.jsonl"))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    found = load_json(path)
    if not isinstance(found, dict):
        raise RequestError(f"{path} is {type(found).__name__}; accepted: a JSON object")
    return found


def _losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step. A last line without its end, as a kill leaves it, is skipped."""
    out: list[tuple[int, float]] = []
    if not path.is_file():
        return out
    if (size := path.stat().st_size) > _MAX_LOG:
        raise RequestError(f"{path} has {size} bytes; accepted: at most {_MAX_LOG}")
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            step, loss = int(record["step"]), float(record.get("loss", math.nan))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise RequestError(f"{path}, line {number}: accepted: an object with step and loss") from None
        if math.isfinite(loss):
            out.append((step, loss))
    return out


def _same_stream(a: Run, b: Run) -> None:
    """Raises RequestError naming the first difference between the stages or evals of two runs."""
    pairs: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        ("stage", a.matrix.stages, b.matrix.stages),
        ("eval", a.matrix.evals, b.matrix.evals),
    ]
    for what, ours, theirs in pairs:
        if len(ours) != len(theirs):
            found = f"{len(ours)} and {len(theirs)} {what}s"
            raise RequestError(f"{a.path} and {b.path} have {found}; accepted: runs of one stream")
        for x, y in zip(ours, theirs):
            for field, u, v in zip(x._fields, x, y):
                if u != v:
                    where = f"{field} of {what} {x[0]!r} is {u!r} in {a.path} and {v!r} in {b.path}"
                    raise RequestError(f"{where}; accepted: runs of one stream")


def flatten(value: Any, at: str = "") -> dict[str, Any]:
    """{dotted path: leaf} of nested JSON; list items that name their stage go by that name."""
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        items = [_labelled(v, i) for i, v in enumerate(value)]
    else:
        return {at: value}
    return {k: leaf for key, v in items for k, leaf in flatten(v, f"{at}.{key}" if at else key).items()}


def _labelled(item: Any, index: int) -> tuple[str, Any]:
    if not (isinstance(item, dict) and "stage" in item):
        return str(index), item
    return str(item["stage"] or "before training"), {k: v for k, v in item.items() if k != "stage"}


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(dotted key, value in each run) of what is not equal in all of them."""
    flat = [flatten(r.config) for r in runs]
    keys = dict.fromkeys(k for f in flat for k in f)
    rows = [(k, [f.get(k) for f in flat]) for k in keys]
    return [(k, values) for k, values in rows if any(v != values[0] for v in values)]
