"""matrix.json: what a run measured, read with suspicion and written in one piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.core.files import read_bytes
from jaxcl.errors import RequestError, clipped, nearest, shown
from jaxcl.metrics.pooling import POOLS

SCHEMA = 1
ROLES = ("task", "general", "probe", "instruction", "safety")
BASELINES = ("random", "single", "joint")
MAX_BYTES = 64 << 20
_SLACK = 1e-9  # a mean of values inside a range may leave it by rounding


class Stage(NamedTuple):
    """A stage and the ids of the evals that it teaches."""

    name: str
    evals: tuple[str, ...]


class Eval(NamedTuple):
    """One test set. range: (lo, hi), infinite where JSON says null. n: number of items. pool: how its items make its
    number where that is not the mean of their scores (`jaxcl.metrics.pooling`)."""

    id: str
    metric: str
    higher_is_better: bool
    range: tuple[float, float]
    n: int
    role: str = "task"
    pool: str | None = None


class Matrix(NamedTuple):
    """rows f64[done, E] after each finished stage, row0 f64[E] before any; NaN: not measured."""

    stages: tuple[Stage, ...]
    evals: tuple[Eval, ...]
    row0: np.ndarray
    rows: np.ndarray
    random: np.ndarray | None = None
    single: np.ndarray | None = None
    joint: np.ndarray | None = None

    @property
    def partial(self) -> bool:
        """Whether stages are still to come."""
        return len(self.rows) < len(self.stages)

    def learned(self, eval_id: str) -> int | None:
        """Index of the first stage that teaches an eval, None if none does."""
        return next((t for t, s in enumerate(self.stages) if eval_id in s.evals), None)


def load_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """A JSON file of bounded size. Raises RequestError (absent, too large, malformed: with the line)."""
    try:
        return json.loads(read_bytes(path, max_bytes).decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise RequestError(f"no such file: {path}") from None
    except OSError as e:
        raise RequestError(f"cannot read {path}: {e.strerror}") from None
    except json.JSONDecodeError as e:
        place = f"{path}, line {e.lineno}, column {e.colno}"
        raise RequestError(f"{place}: not JSON ({e.msg.lower()})") from None
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{path}: not JSON that can be read ({e})") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the number {name}; accepted: finite numbers, and null for what was not measured")


def read_matrix(path: str | os.PathLike[str]) -> Matrix:
    """Reads and checks a matrix.json, or the one in a run directory. Raises RequestError."""
    path = Path(path)
    path = path / "matrix.json" if path.is_dir() else path
    return parse_matrix(load_json(path), str(path))


def parse_matrix(obj: Any, where: str) -> Matrix:
    """The checked form of a decoded matrix.json; ``where`` names it in errors. Raises RequestError."""
    _need(isinstance(obj, dict), where, "the file", type(obj).__name__, "an object with schema, stages, ...")
    schema = obj.get("schema")
    _need(_is_int(schema) and schema == SCHEMA, where, "schema", schema, str(SCHEMA))
    for key in ("stages", "evals", "rows"):
        _need(isinstance(obj.get(key), list), where, key, obj.get(key), "a list")
    evals = tuple(_eval(e, f"evals[{i}]", where) for i, e in enumerate(obj["evals"]))
    by_id = {e.id: e for e in evals}
    _need(len(by_id) == len(evals), where, "evals", [e.id for e in evals], "ids that differ")
    stages = tuple(_stage(s, f"stages[{t}]", where, by_id) for t, s in enumerate(obj["stages"]))
    rows, count = obj["rows"], len(stages)
    _need(len(rows) <= count, where, "rows", f"{len(rows)} rows", f"at most {count}, one for each stage")
    parsed = [_row(r, f"rows[{t}]", where, evals) for t, r in enumerate(rows)]
    given = {k: _row(obj[k], k, where, evals) for k in ("row0", *BASELINES) if obj.get(k) is not None}
    row0 = given.pop("row0", np.full(len(evals), np.nan))
    return Matrix(stages, evals, row0, np.array(parsed, np.float64).reshape(len(rows), len(evals)), **given)


def _need(ok: bool, where: str, key: str, value: Any, accepted: str) -> None:
    if not ok:
        quoted = shown(value) if not isinstance(value, str) or key not in ("the file", "rows") else value
        raise RequestError(f"{where}: {key} is {quoted}; accepted: {accepted}")


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_number(v: Any) -> bool:
    try:
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    except OverflowError:  # an integer too large for a float
        return False


def _eval(e: Any, key: str, where: str) -> Eval:
    _need(isinstance(e, dict), where, key, e, "an object with id, metric, higher_is_better, range, n, role")
    for name in ("id", "metric"):
        value = e.get(name)
        _need(isinstance(value, str) and bool(value), where, f"{key}.{name}", value, "a text")
    better, n, role, bounds = e.get("higher_is_better"), e.get("n"), e.get("role"), e.get("range")
    _need(isinstance(better, bool), where, f"{key}.higher_is_better", better, "true or false")
    _need(_is_int(n) and n >= 1, where, f"{key}.n", n, "a whole number of items, at least 1")
    _need(role in ROLES, where, f"{key}.role", role, ", ".join(ROLES))
    accepted = "[lo, hi], two numbers with lo < hi (null: no bound)"
    _need(isinstance(bounds, list) and len(bounds) == 2, where, f"{key}.range", bounds, accepted)
    lo, hi = (s * math.inf if b is None else b for s, b in zip((-1, 1), bounds))
    ok = all(b is None or _is_number(b) for b in bounds) and lo < hi
    _need(ok, where, f"{key}.range", bounds, accepted)
    pool = e.get("pool")
    _need(pool is None or (isinstance(pool, str) and pool in POOLS), where, f"{key}.pool", pool, ", ".join(POOLS))
    return Eval(e["id"], e["metric"], better, (float(lo), float(hi)), n, role, pool)


def _stage(s: Any, key: str, where: str, by_id: Mapping[str, Eval]) -> Stage:
    _need(isinstance(s, dict), where, key, s, "an object with name and evals")
    name, taught = s.get("name"), s.get("evals")
    _need(isinstance(name, str) and bool(name), where, f"{key}.name", name, "a text")
    texts = isinstance(taught, list) and all(isinstance(i, str) for i in taught)
    _need(texts, where, f"{key}.evals", taught, "a list of the ids of evals")
    for i in taught:
        if i not in by_id:
            raise RequestError(f"{where}: unknown eval {clipped(i)!r} in {key}.evals; {nearest(i, by_id)}")
        _need(by_id[i].role == "task", where, f"role of {i!r} in {key}.evals", by_id[i].role, "task")
    return Stage(name, tuple(taught))


def _row(row: Any, key: str, where: str, evals: tuple[Eval, ...]) -> np.ndarray:
    _need(isinstance(row, list), where, key, row, "a list")
    if len(row) != len(evals):
        raise RequestError(f"{where}: {key} has {len(row)} values; accepted: {len(evals)}, one for each eval")
    for i, (v, e) in enumerate(zip(row, evals)):
        if v is None:
            continue
        _need(_is_number(v), where, f"{key}[{i}]", v, "a finite number, or null for what was not measured")
        (lo, hi), slack = e.range, _SLACK * max(1.0, abs(v))
        inside = lo - slack <= v <= hi + slack
        _need(inside, where, f"{key}[{i}] ({e.id})", v, f"a number from {lo:g} to {hi:g} (its range)")
    return np.array([np.nan if v is None else v for v in row], np.float64)


def matrix_json(m: Matrix) -> dict[str, Any]:
    """The JSON form of a matrix; NaN and infinite bounds become null."""

    def plain(row: np.ndarray) -> list[float | None]:
        return [None if np.isnan(v) else float(v) for v in row]

    bounds = [[None if math.isinf(b) else b for b in e.range] for e in m.evals]
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "stages": [{"name": s.name, "evals": list(s.evals)} for s in m.stages],
        "evals": [_eval_json(e) | {"range": b} for e, b in zip(m.evals, bounds)],
        "row0": plain(m.row0),
        "rows": [plain(r) for r in m.rows],
    }
    return out | {k: plain(v) for k in BASELINES if (v := getattr(m, k)) is not None}


def _eval_json(e: Eval) -> dict[str, Any]:
    return {k: v for k, v in e._asdict().items() if k != "pool" or v is not None}


def write_matrix(path: str | os.PathLike[str], matrix: Matrix | Mapping[str, Any]) -> None:
    """Checks a matrix (or its JSON form) and writes it whole or not at all. Raises RequestError."""
    path = Path(path)
    obj = matrix_json(matrix) if isinstance(matrix, Matrix) else dict(matrix)
    parse_matrix(obj, str(path))
    write_text(path, json.dumps(obj, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
