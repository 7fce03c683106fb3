"""Paired bootstrap over test items: how much of a number is the choice of the test set.

The items of an eval are resampled jointly for every row of the matrix (and for every run, in a
difference), so that what is common to the rows cancels, as it does in the metric. It says nothing about
seeds or task orders; for those compare runs. Efron & Tibshirani 1993, percentile intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Matrix
from jaxcl.metrics.pooling import pool_named
from jaxcl.metrics.predictions import ItemScores, read_items
from jaxcl.metrics.score import metrics_of, mixed, task_columns, task_scores

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
_CHUNK = 4_000_000  # indices drawn at once
_AGREE = 1e-6  # how far what the items add up to may be from the matrix cell


def resampled_sums(parts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of f64[rows, n, P] over ``resamples`` draws of n items with replacement, the same draw for every
    row: f64[resamples, rows, P]. Rows that hold NaN stay NaN."""
    rows, n, width = parts.shape
    flat, out = parts.transpose(1, 0, 2).reshape(n, rows * width), []
    for start in range(0, resamples, step := max(1, _CHUNK // n)):
        size = min(step, resamples - start)
        drawn = rng.integers(0, n, size=(size, n)) + np.arange(size)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        out.append(counts @ flat)
    return np.concatenate(out).reshape(resamples, rows, width)


def resampled_matrices(
    matrices: Sequence[Matrix], runs: Sequence[Path], resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[list[np.ndarray] | None, str | None]:
    """For runs with the same evals: (one f64[resamples, 1 + stages done, evals] each, row 0 first; None),
    or (None, the reason why there are no intervals). Raises RequestError on damaged prediction files."""
    heights = [1 + len(m.rows) for m in matrices]
    out = [np.full((resamples, h, len(m.evals)), np.nan) for h, m in zip(heights, matrices)]
    for i in task_columns(matrices[0]):
        e = matrices[0].evals[i]
        items = [read_items(run, e, h) for run, h in zip(runs, heights)]
        found = [it for it in items if it is not None]
        if len(found) < len(items):
            return None, f"no predictions of {e.id}"
        if any(it.ids != found[0].ids or it.parts.shape[2] != found[0].parts.shape[2] for it in found):
            return None, f"the runs answered different items of {e.id}"
        if not all(_agrees(m, i, it) for m, it in zip(matrices, found)):
            return None, f"the scores of the items of {e.id} do not add up to its cells in the matrix"
        rng = np.random.default_rng([seed, i])
        sums = resampled_sums(np.concatenate([it.parts for it in found]), resamples, rng)
        for boot, part in zip(out, np.split(pool_named(e.pool)(sums), np.cumsum(heights)[:-1], axis=1)):
            boot[:, :, i] = part
    return out, None


def _agrees(m: Matrix, column: int, items: ItemScores) -> bool:
    cells = np.concatenate([m.row0[None, column], m.rows[:, column]])
    gap = np.abs(cells - pool_named(m.evals[column].pool)(items.parts.sum(1)))
    return bool(np.all(np.isnan(gap) | (gap <= _AGREE * np.maximum(1, np.abs(cells)))))


def _metric_draws(m: Matrix, boot: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: f64[resamples]} of those that the resampled matrices define."""
    scores = task_scores(m, boot[:, 1:], boot[:, 0])
    values = {name: info.of(scores)[0] for name, info in metrics_of(m).items()}
    return {k: v for k, v in values.items() if v is not None and not np.isnan(v).any()}


def _interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def intervals(
    m: Matrix, run: Path, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> tuple[dict[str, tuple[float, float]], str | None]:
    """({metric: (lo, hi)} of one run, None), or ({}, the reason). random, single and joint are constants."""
    boot, reason = resampled_matrices([m], [run], resamples, seed)
    if boot is None:
        return {}, reason
    return {k: _interval(v, level) for k, v in _metric_draws(m, boot[0]).items()}, None


def differences(
    a: tuple[Matrix, Path],
    b: tuple[Matrix, Path],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[dict[str, tuple[float, float]], str | None]:
    """({metric: (lo, hi) of run b minus run a on the same items}, None), or ({}, the reason)."""
    if a[0].evals != b[0].evals or a[0].stages != b[0].stages:
        raise RequestError(f"{a[1]} and {b[1]} have different stages or evals; accepted: runs of one stream")
    if len(a[0].rows) != len(b[0].rows):
        return {}, "one run has more stages done than the other"
    if mixed(a[0]):
        return {}, mixed(a[0])
    boot, reason = resampled_matrices([a[0], b[0]], [a[1], b[1]], resamples, seed)
    if boot is None:
        return {}, reason
    first, second = (_metric_draws(m, x) for (m, _), x in zip((a, b), boot))
    return {k: _interval(second[k] - first[k], level) for k in first.keys() & second.keys()}, None
