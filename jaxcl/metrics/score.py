"""From a matrix file to what `jaxcl score` prints and metrics.json keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.metrics.matrix import METRICS, Scores, explain, make_scores, series
from jaxcl.metrics.matrix_file import BASELINES, Matrix, parse_matrix


def task_columns(m: Matrix) -> list[int]:
    """Indices of the evals that form the task matrix: those that some stage teaches."""
    return [i for i, e in enumerate(m.evals) if m.learned(e.id) is not None]


def sign(m: Matrix) -> int:
    """-1 where the task evals are losses: they are negated first, so that higher is better everywhere."""
    tasks = task_columns(m)
    return -1 if tasks and not m.evals[tasks[0]].higher_is_better else 1


def mixed(m: Matrix) -> str | None:
    """Why the task evals cannot be averaged, or None: they must share one direction and one range."""
    kinds = {(e.higher_is_better, e.range): e.id for e in (m.evals[i] for i in task_columns(m))}
    if len(kinds) < 2:
        return None
    words = {True: "higher", False: "lower"}
    shown = [f"{i} ({words[up]} better, {r[0]:g} to {r[1]:g})" for (up, r), i in kinds.items()]
    return "evals of different scale: " + ", ".join(shown)


def task_scores(m: Matrix, R: np.ndarray | None = None, row0: np.ndarray | None = None) -> Scores:
    """The task matrix of a file, negated where it holds losses. R, row0: other values of the same shape
    with any leading axes (resampled ones), f64[..., rows, evals] and f64[..., evals]."""
    cols, s = task_columns(m), sign(m)
    learned = [t for i in cols if (t := m.learned(m.evals[i].id)) is not None]
    row0 = m.row0 if row0 is None else row0
    base = {k: s * v[cols] for k in BASELINES if (v := getattr(m, k)) is not None}
    zero = None if np.isnan(m.row0[cols]).all() else s * row0[..., cols]
    return make_scores(s * (m.rows if R is None else R)[..., cols], zero, learned=learned, **base)


def drift(m: Matrix) -> dict[str, Any]:
    """Evals that no stage teaches (general ability, probes): the last row minus row 0, each and by role.

    A positive delta is an improvement, for losses too. The mean over the evals of role 'general' is
    TRACE's general ability delta; null with a reason where the scales differ or a value is missing.
    """
    apart = [i for i in range(len(m.evals)) if i not in task_columns(m)]
    out: dict[str, Any] = {"evals": {}, "mean_delta": {}}
    last = m.rows[-1] if len(m.rows) else np.full(len(m.evals), np.nan)
    for i in apart:
        e = m.evals[i]
        delta = (last[i] - m.row0[i]) * (1 if e.higher_is_better else -1)
        entry = {"role": e.role, "before": float(m.row0[i]), "after": float(last[i]), "delta": float(delta)}
        out["evals"][e.id] = {k: None if v != v else v for k, v in entry.items()}  # NaN: not measured
    for role in sorted({m.evals[i].role for i in apart}):
        group = [m.evals[i] for i in apart if m.evals[i].role == role]
        deltas = [out["evals"][e.id]["delta"] for e in group]
        if len({(e.higher_is_better, e.range) for e in group}) > 1:
            out["mean_delta"][role] = {"value": None, "reason": "evals of different scale"}
        elif None in deltas:
            out["mean_delta"][role] = {"value": None, "reason": "needs row0 and the last row of every eval"}
        else:
            out["mean_delta"][role] = {"value": float(np.mean(deltas))}
    return out


def score_matrix(m: Matrix | Mapping[str, Any], run: Path | None = None) -> dict[str, Any]:
    """Every metric of a matrix (or of its JSON form) as JSON; with a run directory also intervals, where
    its predictions allow them. Raises RequestError on a malformed matrix or damaged predictions.

    {"schema", "stages", "stages_done", "partial", "sign", "metrics": {name: {"value", "convention"[,
    "reason"][, "interval": [lo, hi]]}}, "series": {name: [one a stage]}, "drift", "intervals"}.
    """
    m = m if isinstance(m, Matrix) else parse_matrix(m, "matrix")
    scores, blocked = task_scores(m), mixed(m)
    found = explain(scores)
    metrics: dict[str, Any] = {}
    for name, info in METRICS.items():
        value, reason = (None, blocked) if blocked else found[name]
        metrics[name] = {"value": value, "convention": info.convention}
        metrics[name] |= {"reason": reason} if reason else {}
    document: dict[str, Any] = {
        "schema": 1,
        "stages": len(m.stages),
        "stages_done": len(m.rows),
        "partial": m.partial,
        "sign": "losses: negated first, so that higher is better" if sign(m) < 0 else "higher is better",
        "metrics": metrics,
        "series": {} if blocked else series(scores),
        "drift": drift(m),
    }
    if run is not None and not blocked:
        _add_intervals(document, m, run)
    return document


def _add_intervals(document: dict[str, Any], m: Matrix, run: Path) -> None:
    from jaxcl.metrics.bootstrap import LEVEL, RESAMPLES, SEED, intervals

    found, reason = intervals(m, run)
    for name, (lo, hi) in found.items():
        if document["metrics"][name]["value"] is not None:
            document["metrics"][name]["interval"] = [lo, hi]
    document["intervals"] = {
        "method": "percentile bootstrap over test items, the same draw for all rows of an eval",
        "resamples": RESAMPLES, "seed": SEED, "level": LEVEL,
    } | ({"reason": reason} if reason else {})  # fmt: skip
