"""A refinement stream read off a run: the predictions of row t-1 are f_{t-1}'s, those of row t are f_t's.

Every stage is a step, and the one eval that it teaches asks that step's queries Q_t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.errors import RequestError, unknown
from jaxcl.metrics.cmr import Step, past_sample
from jaxcl.metrics.matrix_file import Eval, Matrix, read_matrix
from jaxcl.metrics.predictions import read_items


class Refined(NamedTuple):
    """What `jaxcl.metrics.cmr.refinement` takes: the steps that are done, and ukr, okr, kg of the model after them."""

    steps: list[Step]
    after: dict[str, float]


def steps_of(
    run: Path, *, upstream: str | None = None, ood: Sequence[str] = (), sample: int = 64, seed: int = 0
) -> Refined:
    """upstream, ood: evals for UKR and KG (the items of several count alike). sample: past submissions for OKR, drawn
    anew for each step by ``seed``; there is no OKR while there are fewer.

    RequestError: a stage that does not teach one eval, an unknown eval, one whose items are not right or wrong, queries
    that were not asked before and after their step.
    """
    m = read_matrix(run)
    done = len(m.rows)
    asked = [_right(run, _queries(m, t), done + 1) for t in range(done)]
    held_out = {"ukr": _pooled(run, m, [upstream] if upstream else []), "kg": _pooled(run, m, ood)}
    beside = [_beside(held_out, asked[:row], row, sample, seed) for row in range(done + 1)]
    steps = [Step(*_counts(m, t, asked[t]), *map(beside[t].get, ("ukr", "okr", "kg"))) for t in range(done)]
    return Refined(steps, beside[-1])


def _queries(m: Matrix, t: int) -> Eval:
    stage = m.stages[t]
    if len(stage.evals) != 1:
        raise RequestError(f"stage {stage.name!r} teaches {len(stage.evals)} evals; accepted: one, its queries")
    return next(e for e in m.evals if e.id == stage.evals[0])


def _right(run: Path, e: Eval, rows: int) -> np.ndarray:
    """f64[rows, n]: 1 where an item is right in a row, 0 where wrong, NaN where the row was not asked."""
    items = None if e.pool else read_items(run, e, rows)
    scores = np.full((rows, 0), np.nan) if items is None else items.parts[..., 0]
    if not (scores.size and np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all()):
        raise RequestError(f"eval {e.id!r} of {run} has no items that are right or wrong; accepted: exact match, kept")
    return scores


def _counts(m: Matrix, t: int, right: np.ndarray) -> tuple[int, int, int]:
    """(queries, errors, fixed) of right [rows, n], the step's queries."""
    before, after = right[t], right[t + 1]
    if np.isnan(before).any() or np.isnan(after).any():
        where = f"queries of stage {m.stages[t].name!r}"
        raise RequestError(f"{where} have no predictions in row {t} or {t + 1}; accepted: both, before and after it")
    wrong = before == 0
    return len(before), int(wrong.sum()), int(after[wrong].sum())


def _pooled(run: Path, m: Matrix, names: Sequence[str]) -> np.ndarray | None:
    """[rows, items] of several evals together."""
    evals = {e.id: e for e in m.evals}
    for name in names:
        if name not in evals:
            raise unknown("eval", name, evals, where=str(run))
    return np.concatenate([_right(run, evals[n], len(m.rows) + 1) for n in names], axis=1) if names else None


def _beside(
    held_out: Mapping[str, np.ndarray | None], past: Sequence[np.ndarray], row: int, sample: int, seed: int
) -> dict[str, float]:
    """What was measured of ukr, kg and okr in a row."""
    found = {name: scores[row] for name, scores in held_out.items() if scores is not None}
    history = [float(x) for scores in past for x in scores[row]]
    drawn = past_sample(history, sample, seed=seed, step=row + 1) if history else None
    if drawn is not None:
        found["okr"] = np.array(drawn)
    return {name: float(values.mean()) for name, values in found.items() if not np.isnan(values).any()}
