"""From a matrix file to what `jaxcl score` prints and metrics.json keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.metrics.matrix import METRICS, MetricInfo, Scores, explain, make_scores, series
from jaxcl.metrics.matrix_file import BASELINES, Eval, Matrix, parse_matrix
from jaxcl.metrics.nats import NATS
from jaxcl.metrics.trace import DELTAS, on_one_scale


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


def drift(m: Matrix) -> dict[str, Any]:
    """Evals that no stage teaches (general ability, instruction following, safety, probes): the last row minus row 0,
    each and by role, the mean also after every stage. These are TRACE's deltas (`jaxcl.metrics.trace.DELTAS`).

    A positive delta is an improvement, for losses too. A mean is null with a reason where the scales differ or a value
    is missing.
    """
    apart = [i for i in range(len(m.evals)) if i not in task_columns(m)]
    change = np.where([e.higher_is_better for e in m.evals], 1, -1) * (m.rows - m.row0)
    out: dict[str, Any] = {"evals": {}, "mean_delta": {}, "per_stage": {}}
    for i in apart:
        before, after = m.row0[i], m.rows[-1, i] if len(m.rows) else np.nan
        delta = change[-1, i] if len(m.rows) else np.nan
        entry = {"before": float(before), "after": float(after), "delta": float(delta)}
        out["evals"][m.evals[i].id] = {"role": m.evals[i].role} | {k: _plain(v) for k, v in entry.items()}
    for role in sorted({m.evals[i].role for i in apart}):
        group = [i for i in apart if m.evals[i].role == role]
        found = _mean_delta([m.evals[i] for i in group], change[:, group])
        info = DELTAS.get(role)
        named = {"name": info.name, "convention": info.convention, "papers": info.papers} if info else {}
        out["mean_delta"][role] = found | named
        if "reason" not in found:
            out["per_stage"][role] = [_plain(v) for v in change[:, group].mean(1).tolist()]
    return out


def _mean_delta(group: list[Eval], change: np.ndarray) -> dict[str, Any]:
    if len({(e.higher_is_better, e.range) for e in group}) > 1:
        return {"value": None, "reason": "evals of different scale"}
    if not len(change) or np.isnan(change[-1]).any():
        return {"value": None, "reason": "needs row0 and the last row of every eval"}
    return {"value": float(change[-1].mean())}


def _plain(x: float) -> float | None:
    """NaN is what was not measured."""
    return None if np.isnan(x) else x


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
