"""CMR's numbers of a finished run: its steps, read off the matrix and the predictions. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.cmr import HELD_OUT, Step
from jaxcl.metrics.matrix_file import Eval, Matrix, read_matrix
from jaxcl.metrics.predictions import read_items

QUERIES = "queries/"


def steps_of(run: Path) -> tuple[list[Step], dict[str, float]]:
    """(a `Step` for every stage, what the model after the last repair knows) of a run directory of a stream
    ``refinement/...``; both go into `jaxcl.metrics.cmr.refinement`.

    RequestError: another stream's run, one without row 0 (the errors of the first step are unknown), damaged files.
    """
    matrix = read_matrix(run / "matrix.json")
    by_id = {e.id: e for e in matrix.evals}
    absent = [name for name in HELD_OUT if name not in by_id]
    if absent or not any(e.id.startswith(QUERIES) for e in matrix.evals):
        raise RequestError(f"{run}: no eval {(absent or [QUERIES])[0]!r}; accepted: a run of a stream refinement/...")
    if np.isnan(matrix.row0).all():
        raise RequestError(f"{run}: no row 0, so nothing says what the first step got wrong; accepted: row0=True")
    known = {name: _column(matrix, name) for name in HELD_OUT}
    done = len(matrix.rows)
    steps = [
        Step(*_repaired(run, by_id[QUERIES + stage.name], t), *(known[name][t] for name in HELD_OUT))
        for t, stage in enumerate(matrix.stages[:done])
    ]
    return steps, {name: value for name in HELD_OUT if (value := known[name][done]) is not None}


def _repaired(run: Path, e: Eval, t: int) -> tuple[int, int, int]:
    """(queries, errors before the step, errors that are right after it)."""
    items = read_items(run, e, t + 2)
    if items is None or np.isnan(items.parts[t : t + 2]).any():
        raise RequestError(f"{run}: no predictions of {e.id!r} before and after its step")
    before, after = items.parts[t : t + 2, :, 0]
    wrong = before == 0
    return len(items.ids), int(wrong.sum()), int((wrong & (after == 1)).sum())


def _column(matrix: Matrix, name: str) -> Sequence[float | None]:
    at = [e.id for e in matrix.evals].index(name)
    return [None if np.isnan(row[at]) else float(row[at]) for row in (matrix.row0, *matrix.rows)]
