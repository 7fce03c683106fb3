"""CMR's numbers of a run of a stream ``refinement/...``. Nothing here imports jax."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxcl.errors import unknown
from jaxcl.metrics.cmr_run import Refined, steps_of
from jaxcl.metrics.matrix_file import read_matrix


def refined(run: Path) -> Refined:
    """The steps of a run directory and what its last model knows; both go into `jaxcl.metrics.cmr.refinement`.

    Errors, repairs, UKR and KG are read off predictions (`jaxcl.metrics.cmr_run.steps_of`), OKR off the matrix: the
    stream asks only a sample of the past submissions. RequestError: another stream's run, or what `steps_of` refuses.
    """
    matrix = read_matrix(run)
    ids = [e.id for e in matrix.evals]
    for name in ("ukr", "okr", "kg"):
        if name not in ids:
            raise unknown("eval", name, ids, where=f"{run}, which is no run of a stream refinement/...")
    found = steps_of(run, upstream="ukr", ood=["kg"])
    column = [row[ids.index("okr")] for row in (matrix.row0, *matrix.rows)]
    okr = [None if np.isnan(value) else float(value) for value in column]
    steps = [step._replace(okr=okr[t]) for t, step in enumerate(found.steps)]
    after = {name: value for name, value in (found.after | {"okr": okr[-1]}).items() if value is not None}
    return Refined(steps, after)
