"""From a matrix file to what `jaxcl score` prints and metrics.json keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.metrics.drift import drift
from jaxcl.metrics.matrix import METRICS, MetricInfo, Scores, explain, make_scores, series
from jaxcl.metrics.matrix_file import BASELINES, Matrix, parse_matrix
from jaxcl.metrics.nats import NATS
from jaxcl.metrics.trace import on_one_scale


def task_columns(m: Matrix) -> list[int]:
    """Indices of the evals that form the task matrix: those that some stage teaches."""
    return [i for i, e in enumerate(m.evals) if m.learned(e.id) is not None]


def sign(m: Matrix) -> int:
    """-1 where the task evals are losses: they are negated first, so that higher is better everywhere."""
    tasks = task_columns(m)
    return -1 if tasks and not m.evals[tasks[0]].higher_is_better else 1


def metrics_of(m: Matrix) -> dict[str, MetricInfo]:
    """What a matrix can have: the accuracy matrix's metrics, and those in nats where its task evals are nll."""
    return METRICS | NATS if _task_metrics(m) in ({"nll"}, {"perplexity"}) else METRICS


def _task_metrics(m: Matrix) -> set[str]:
    return {m.evals[i].metric for i in task_columns(m)}


def mixed(m: Matrix) -> str | None:
    """Why the task evals cannot be averaged, or None: they must share one direction and one range."""
    kinds = {(e.higher_is_better, e.range): e.id for e in (m.evals[i] for i in task_columns(m))}
    if len(kinds) < 2:
        return None
    words = {True: "higher", False: "lower"}
    shown = [f"{i} ({words[up]} better, {r[0]:g} to {r[1]:g})" for (up, r), i in kinds.items()]
    bounded = len({up for up, _ in kinds}) == 1 and all(np.isfinite(r[1] - r[0]) for _, r in kinds)
    return "evals of different scale: " + ", ".join(shown) + ("; --one-scale takes shares of their ranges" * bounded)


def one_scale(m: Matrix) -> Matrix:
    """Every score of a task eval as its share of the eval's range, so that all may be averaged (as TRACE's must be).
    RequestError where a range has no bound."""
    cols = task_columns(m)
    ranges = [m.evals[i].range for i in cols]

    def scaled(values: np.ndarray) -> np.ndarray:
        out = values.copy()
        out[..., cols] = on_one_scale(values[..., cols], ranges)
        return out

    if not cols:
        return m
    evals = tuple(e._replace(range=(0.0, 1.0)) if i in cols else e for i, e in enumerate(m.evals))
    given: Any = {name: scaled(v) for name in BASELINES if (v := getattr(m, name)) is not None}
    return m._replace(evals=evals, row0=scaled(m.row0), rows=scaled(m.rows), **given)


def task_scores(m: Matrix, R: np.ndarray | None = None, row0: np.ndarray | None = None) -> Scores:
    """The task matrix of a file, negated where it holds losses; of perplexities the logarithms, since only those are
    added and subtracted. R, row0: other values of the same shape with any leading axes (resampled ones), f64[..., rows,
    evals] and f64[..., evals]."""
    cols, s = task_columns(m), sign(m)
    log = np.log if _task_metrics(m) == {"perplexity"} else np.asarray
    learned = [t for i in cols if (t := m.learned(m.evals[i].id)) is not None]
    row0 = m.row0 if row0 is None else row0
    base = {k: s * log(v[cols]) for k in BASELINES if (v := getattr(m, k)) is not None}
    zero = None if np.isnan(m.row0[cols]).all() else s * log(row0[..., cols])
    return make_scores(s * log((m.rows if R is None else R)[..., cols]), zero, learned=learned, **base)


def score_matrix(m: Matrix | Mapping[str, Any], run: Path | None = None) -> dict[str, Any]:
    """Every metric of a matrix (or of its JSON form) as JSON; with a run directory also intervals, where
    its predictions allow them. Raises RequestError on a malformed matrix or damaged predictions.

    {"schema", "stages", "stages_done", "partial", "sign", "metrics": {name: {"value", "convention", "papers"[,
    "reason"][, "interval": [lo, hi]]}}, "series": {name: [one a stage]}, "drift", "intervals"}.
    """
    m = m if isinstance(m, Matrix) else parse_matrix(m, "matrix")
    scores, blocked, infos = task_scores(m), mixed(m), metrics_of(m)
    found = explain(scores, infos)
    metrics: dict[str, Any] = {}
    for name, info in infos.items():
        value, reason = (None, blocked) if blocked else found[name]
        metrics[name] = {"value": value, "convention": info.convention, "papers": info.papers}
        metrics[name] |= {"reason": reason} if reason else {}
    document: dict[str, Any] = {
        "schema": 1,
        "stages": len(m.stages),
        "stages_done": len(m.rows),
        "partial": m.partial,
        "sign": _sign_in_words(m),
        "metrics": metrics,
        "series": {} if blocked else series(scores),
        "drift": drift(m),
    }
    if run is not None and not blocked:
        _add_intervals(document, m, run)
    return document


def _sign_in_words(m: Matrix) -> str:
    if sign(m) > 0:
        return "higher is better"
    what = "logarithms of perplexities" if _task_metrics(m) == {"perplexity"} else "losses"
    return f"{what}: negated first, so that higher is better"


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
