"""Intervals of single cells of the matrix, over their test items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcl.metrics.bootstrap import LEVEL, resampled_matrices
from jaxcl.metrics.matrix_file import Matrix, Stage
from jaxcl.report.run_files import Run


def with_bounds(runs: Sequence[Run]) -> list[Run]:
    """The runs with ``bounds`` filled in wherever an eval's predictions are kept and agree with the matrix: percentile
    intervals of the bootstrap that gives the metrics theirs. Raises RequestError on damaged predictions."""
    return [r._replace(bounds=_bounds(r)) if r.measured else r for r in runs]


def _bounds(r: Run) -> np.ndarray:
    out = r.bounds.copy()
    for i in range(len(r.matrix.evals)):
        draws, _ = resampled_matrices([_column(r.matrix, i)], [r.path])
        if draws is not None:
            out[:, :, i] = np.quantile(draws[0][:, :, 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return out


def _column(m: Matrix, i: int) -> Matrix:
    """One eval as a matrix of its own: also those that no stage teaches are resampled, and each stands for itself."""
    e = m.evals[i]
    stages = tuple(Stage(s.name, (e.id,)) for s in m.stages)
    return Matrix(stages, (e,), m.row0[i : i + 1], m.rows[:, i : i + 1])
