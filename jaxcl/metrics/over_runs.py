"""Several seeds or orders of one experiment: each run's numbers, their mean and sample deviation.

Numbers are computed run by run: averaging the matrices first would bias every metric that takes a maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Matrix, load_json, read_matrix
from jaxcl.metrics.score import one_scale as on_one_scale
from jaxcl.metrics.score import score_matrix
from jaxcl.metrics.table import required


def over_runs(runs: Sequence[Mapping[str, float | None]]) -> dict[str, tuple[float, float] | None]:
    """{metric: (mean, sample standard deviation)} over seeds or orders; None where a run has no value."""
    out: dict[str, tuple[float, float] | None] = {}
    for name in runs[0] if runs else ():
        values = [v for run in runs if (v := run.get(name)) is not None]
        whole = len(values) == len(runs) > 1
        out[name] = (float(np.mean(values)), float(np.std(values, ddof=1))) if whole else None
    return out


def score_run(path: Path, names: Sequence[str] = (), one_scale: bool = False) -> dict[str, Any]:
    """The document of `score_matrix` for a matrix file or a run directory, with the metrics ``names`` where some are
    given. one_scale: of scores as shares of their ranges, then without intervals.

    RequestError: no matrix, an unknown metric, or one that this matrix cannot have.
    """
    m = read_matrix(path)
    return _only(_scored(path, m, one_scale), names, str(path))


def score_runs(paths: Sequence[Path], names: Sequence[str] = (), one_scale: bool = False) -> dict[str, Any]:
    """{"schema", "runs": [{"path", ...the document of `score_matrix`}], "differences": {key of Config: a value a run},
    "mean_and_deviation": {metric: {"mean", "deviation", "n", "values", "convention", "papers"[, "reason"]}}}; drift's
    mean deltas are among the metrics.

    Run directories or matrix files of one stream, in any order of its stages. RequestError: as `score_run`, a run given
    twice, another stream, other evals or other methods, the difference named.
    """
    twice = next((p for i, p in enumerate(paths) if p.resolve() in [q.resolve() for q in paths[:i]]), None)
    if twice is not None:
        raise RequestError(f"run {twice} is given twice; accepted: every run once")
    matrices = [(path, read_matrix(path)) for path in paths]
    for other in matrices[1:]:
        _same_stream(matrices[0], other)
    configs = [(path, _config(path)) for path in paths]
    for config in configs[1:]:
        _same_methods(configs[0], config)
    documents = [{"path": str(path)} | _only(_scored(path, m, one_scale), names, str(path)) for path, m in matrices]
    differences = _differences([found.get("config") for _, found in configs])
    summary = _summary(documents, names)
    return {"schema": 1, "runs": documents, "differences": differences, "mean_and_deviation": summary}


def _scored(path: Path, m: Matrix, one_scale: bool) -> dict[str, Any]:
    if one_scale:
        return score_matrix(on_one_scale(m)) | {"scale": "task evals as shares of their ranges"}
    return score_matrix(m, path if path.is_dir() else None)


def _rows(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A run's metrics, the mean deltas of drift under their names among them."""
    deltas = {d["name"]: d for d in document["drift"]["mean_delta"].values() if "name" in d}
    return document["metrics"] | deltas


def _only(document: dict[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    if not names:
        return document
    for name in names:
        required(name, _rows(document), where)
    return document | {key: {k: v for k, v in document[key].items() if k in names} for key in ("metrics", "series")}


def _same_stream(a: tuple[Path, Matrix], b: tuple[Path, Matrix]) -> None:
    """The same stages and evals, in any order."""
    pairs: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
        ("stage", a[1].stages, b[1].stages),
        ("eval", a[1].evals, b[1].evals),
    )
    for what, ours, theirs in pairs:
        left, right = {x[0]: x for x in ours}, {x[0]: x for x in theirs}
        if left.keys() != right.keys():
            name = min(left.keys() ^ right.keys())
            only, other = (a[0], b[0]) if name in left else (b[0], a[0])
            raise RequestError(f"{what} {name!r} is in {only} and not in {other}; accepted: runs of one stream")
        for name, x in left.items():
            for field, u, v in zip(x._fields, x, right[name]):
                if u != v:
                    difference = f"{field} of {what} {name!r} is {u!r} in {a[0]} and {v!r} in {b[0]}"
                    raise RequestError(f"{difference}; accepted: runs of one stream")


def _config(path: Path) -> dict[str, Any]:
    """What a run directory was made with, empty for a matrix file."""
    file = path / "config.json"
    found = load_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise RequestError(f"{file} is {type(found).__name__}; accepted: a JSON object")
    return found


def _same_methods(a: tuple[Path, dict[str, Any]], b: tuple[Path, dict[str, Any]]) -> None:
    """A mean over methods says nothing; runs that do not say theirs are taken as they are."""
    ours, theirs = (", ".join(map(str, m)) if isinstance(m := c.get("methods"), dict | list) else "" for _, c in (a, b))
    if a[1] and b[1] and ours != theirs:
        shown = f"methods are {ours or 'none'} in {a[0]} and {theirs or 'none'} in {b[0]}"
        raise RequestError(f"{shown}; accepted: seeds or orders of one experiment (jaxcl report compares methods)")


def _differences(configs: Sequence[Any]) -> dict[str, list[Any]]:
    """What was varied: {key: value in each run} of the Configs' keys that are not the same in all."""
    known = [config if isinstance(config, dict) else {} for config in configs]
    values = {key: [config.get(key) for config in known] for key in dict.fromkeys(k for c in known for k in c)}
    return {key: column for key, column in values.items() if any(value != column[0] for value in column)}


def _summary(documents: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    rows = [{k: v for k, v in _rows(d).items() if not names or k in names} for d in documents]
    out: dict[str, Any] = {}
    for name, both in over_runs([{k: row["value"] for k, row in r.items()} for r in rows]).items():
        reason = _no_mean(documents, [r[name]["value"] for r in rows])
        mean, deviation = (None, None) if reason or both is None else both
        entry = {"mean": mean, "deviation": deviation, "n": len(rows), "values": [r[name]["value"] for r in rows]}
        out[name] = entry | {key: rows[0][name][key] for key in ("convention", "papers")}
        out[name] |= {"reason": reason} if reason else {}
    return out


def _no_mean(documents: Sequence[Mapping[str, Any]], values: Sequence[float | None]) -> str | None:
    """Why runs cannot be averaged: they have not come equally far, or one has no value."""
    if len({d["stages_done"] for d in documents}) > 1:
        return "stages done differ: " + ", ".join(f"{d['stages_done']} in {d['path']}" for d in documents)
    lacking = next((d["path"] for d, value in zip(documents, values) if value is None), None)
    return f"no value in {lacking}" if lacking else None
