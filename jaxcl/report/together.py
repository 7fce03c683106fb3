"""What makes runs comparable, and the baselines that they lend each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Matrix
from jaxcl.metrics.score import one_scale as on_one_scale
from jaxcl.metrics.score import score_matrix
from jaxcl.report.run_files import Run, distinct_names, read_run


def read_runs(paths: Sequence[Path], *, intervals: bool = True, one_scale: bool = False) -> list[Run]:
    """The runs, in order, with names that differ. Raises RequestError on what is absent, malformed or unlike.

    One stream: the same stages with the same evals, in any order. A run of one of these stages alone is welcome: its
    score is the ``single`` baseline of the evals that the stage teaches. A finished joint run is the ``joint`` baseline
    of runs in the same order: its score on each eval right after the stage that teaches it. Several of a kind (seeds)
    are averaged. A baseline in a run's own matrix.json stays as it is. one_scale: metrics of shares of the ranges.
    """
    runs = [read_run(path, name) for path, name in zip(paths, distinct_names(paths))]
    measured = [r for r in runs if r.measured]
    if measured:
        stream = max(measured, key=lambda r: len(r.matrix.stages))  # the first of the longest
        runs = [r._replace(alone=_place(stream, r)) if r.measured else r for r in runs]
    single = _single(runs)
    lent = [r._replace(matrix=_lent(r, runs, single)) if r.measured else r for r in runs]
    return [r._replace(score=_score(r, intervals, one_scale)) if r.measured else r for r in lent]


def _place(stream: Run, r: Run) -> str | None:
    """None where the run learns the stream, the stage's name where it learns one of its stages alone. Raises
    RequestError, naming the first difference, where it does neither."""
    ours, theirs = stream.matrix, r.matrix
    one = len(theirs.stages) == 1 < len(ours.stages)
    stages = {s.name: s for s in ours.stages}
    for s in theirs.stages:
        if s.name not in stages:
            _differ(stream, r, f"stage {s.name!r} is in {r.path} and not in {stream.path}")
        u, v = list(stages[s.name].evals), list(s.evals)
        if u != v:
            _differ(stream, r, f"evals of stage {s.name!r} are {u} in {stream.path} and {v} in {r.path}")
    if not one and len(theirs.stages) < len(ours.stages):
        missing = next(n for n in stages if n not in {s.name for s in theirs.stages})
        _differ(stream, r, f"stage {missing!r} is in {stream.path} and not in {r.path}")
    _same_evals(stream, r, subset=one)
    return theirs.stages[0].name if one else None


def _same_evals(stream: Run, r: Run, subset: bool) -> None:
    ours, theirs = ({e.id: e for e in run.matrix.evals} for run in (stream, r))
    for i, e in theirs.items():
        if i not in ours:
            _differ(stream, r, f"eval {i!r} is in {r.path} and not in {stream.path}")
        for field, u, v in zip(e._fields, ours[i], e):
            if u != v:
                _differ(stream, r, f"{field} of eval {i!r} is {u!r} in {stream.path} and {v!r} in {r.path}")
    missing = next((i for i in ours if i not in theirs), None)
    if missing is not None and not subset:
        _differ(stream, r, f"eval {missing!r} is in {stream.path} and not in {r.path}")


def _differ(stream: Run, r: Run, what: str) -> None:
    raise RequestError(f"{what}; accepted: runs of one stream, or of one of its stages alone")


def same_order(a: Matrix, b: Matrix) -> bool:
    """Whether two runs of a stream learn it in the same order and list the same evals."""
    return a.stages == b.stages and a.evals == b.evals


def _own_scores(r: Run) -> dict[str, float]:
    """{eval: score right after the stage that teaches it}, as far as the run came."""
    own = [(i, e.id, r.matrix.learned(e.id)) for i, e in enumerate(r.matrix.evals)]
    return {name: float(r.matrix.rows[t, i]) for i, name, t in own if t is not None and t < len(r.matrix.rows)}


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([s[k] for s in scores if k in s])) for k in {k for s in scores for k in s}}


def _single(runs: Sequence[Run]) -> dict[str, float]:
    """{eval: score of the model that learned its stage alone}. Raises RequestError where these models were not all made
    by the same methods: one baseline cannot be two."""
    alone = [r for r in runs if r.alone is not None]
    for r in alone:
        if (r.methods, r.joint) != (alone[0].methods, alone[0].joint):
            told = f"{alone[0].methods!r} in {alone[0].path} and {r.methods!r} in {r.path}"
            raise RequestError(f"single-task runs by different methods, {told}; accepted: one kind of them a report")
    return _mean([_own_scores(r) for r in alone])


def _lent(r: Run, runs: Sequence[Run], single: dict[str, float]) -> Matrix:
    """The run's matrix with the baselines that the others lend it."""
    lent: dict[str, Any] = {}
    joint = _mean([_own_scores(o) for o in runs if _lends_joint(o, r)])
    for name, found in (("single", single if r.alone is None else {}), ("joint", joint)):
        row = np.array([found.get(e.id, np.nan) for e in r.matrix.evals])
        if getattr(r.matrix, name) is None and not np.isnan(row).all():
            lent[name] = row
    return r.matrix._replace(**lent)


def _score(r: Run, intervals: bool, one_scale: bool) -> dict[str, Any]:
    if one_scale:
        return score_matrix(on_one_scale(r.matrix)) | {"scale": "scores as shares of their evals' ranges"}
    return score_matrix(r.matrix, r.path if intervals else None)


def _lends_joint(giver: Run, taker: Run) -> bool:
    fit = giver.joint and not giver.state and not taker.joint and giver.whole and taker.whole
    return fit and same_order(giver.matrix, taker.matrix)
