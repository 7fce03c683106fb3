"""FUAR: facts forgotten for each fact updated or acquired. Cards metrics/trace-citb-fuar, cpt/ckl.

Jang et al. 2022 (CKL, arXiv 2110.03215). Lower is better; 1 is one old fact lost for one gained. Without any gain there
is no value, which is said, never infinity or 0. Over seeds: compute per run, then average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcl.errors import RequestError, unknown
from jaxcl.metrics.info import Found, Info
from jaxcl.metrics.matrix_file import Matrix

CARD = "metrics/trace-citb-fuar"
_PROBES = ("retained facts", "updated or new facts")
INFO = (
    Info(name="fuar", kind="probes", card=CARD, papers="CKL", needs=_PROBES, lower_is_better=True,
         convention="sum of losses on retained facts over sum of gains on updated and on new facts, each clipped at 0"),
    Info(name="fuar_joint_max", kind="probes", card=CARD, papers="", needs=_PROBES, lower_is_better=True,
         convention="as fuar, but the gain on updated plus that on new facts is clipped at 0 together"),
)  # fmt: skip
Scores = Sequence[float | None]
"""One probe after stages 0..n; None: the probe did not exist at that stage."""
NO_GAIN = "no gain: nothing was updated or acquired"


def fuar(
    retained: Sequence[Scores], updated: Scores | None, acquired: Scores | None, *, joint_max: bool = False
) -> Found:
    """retained[i]: facts of stage i that must stay (T^F_i) after stages 0..n; updated (T^U), acquired (T^A): the last
    stage's facts that changed or are new, None where there are none. Sums over stages i < n on which a probe exists.

    joint_max: the two gains of a stage are added before negative sums are cut off (a secondary source prints that).
    Exact match in one unit (points or shares). RequestError where lengths disagree or nothing is measured after n.
    """
    n = len(retained[0]) - 1 if retained else 0
    rows = [_row(row) for row in retained]
    gained = [_row(row) for row in (updated, acquired) if row is not None]
    if n < 1 or len(rows) > n or any(len(row) != n + 1 for row in (*rows, *gained)):
        lengths = [len(row) for row in (*rows, *gained)]
        raise RequestError(f"probes of lengths {lengths}; accepted: one score after each of stages 0..n, n at least 1")
    if not gained or any(np.isnan(row[n]) for row in (*rows, *gained)):
        raise RequestError("FUAR without gained facts or without a last score; accepted: every probe after stage n")
    lost = sum(float(max(0.0, row[i] - row[n])) for i, row in enumerate(rows) if not np.isnan(row[i]))
    gaps = np.array([row[n] - row[:n] for row in gained])
    gaps = np.nansum(gaps, axis=0) if joint_max else gaps
    gain = float(np.nansum(np.maximum(0.0, gaps)))
    return (lost / gain, None) if gain > 0 else (None, NO_GAIN)


def fuar_of(
    m: Matrix, *, retain: Sequence[str], update: str | None, acquire: str | None, joint_max: bool = False
) -> Found:
    """`fuar` of a matrix by the ids of its probes: retain[i] holds the facts of stage i (stage 0 is row 0) that must
    stay, update and acquire those of the last stage that is done. RequestError for ids that the matrix does not have,
    and for a probe that is a loss."""
    ids = [e.id for e in m.evals]
    rows = np.concatenate([m.row0[None], m.rows])

    def scores(probe: str) -> list[float]:
        if probe not in ids:
            raise unknown("probe", probe, ids)
        column = ids.index(probe)
        if not m.evals[column].higher_is_better:
            raise RequestError(f"probe {probe!r} is scored by {m.evals[column].metric}; accepted: scores, not losses")
        return [float(x) for x in rows[:, column]]

    gained = (None if probe is None else scores(probe) for probe in (update, acquire))
    return fuar([scores(probe) for probe in retain], *gained, joint_max=joint_max)


def _row(scores: Scores) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in scores], np.float64)
