"""TRACE's and CITB's numbers of an instruction-tuning run. Card metrics/trace-citb-fuar.

TRACE (Wang et al. 2023, arXiv 2310.06762) divides its backward transfer by t and adds deltas of general ability,
instruction following and safety. CITB (Zhang et al. 2023, arXiv 2310.14510) divides by T-1 and subtracts no baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, Info, mean
from jaxcl.metrics.matrix import explain, make_scores, series

CARD = "metrics/trace-citb-fuar"
_DELTA = "mean over the evals of role {!r} of the last row minus row 0, losses beside scores left out"
DELTAS: dict[str, Info] = {
    role: Info(name=name, kind="drift", card=CARD, papers=papers, needs=(f"evals of role {role!r}", "row0"),
               convention=_DELTA.format(role))
    for role, name, papers in (
        ("general", "general_delta", "TRACE (GD)"),
        ("instruction", "instruction_delta", "TRACE (IFD)"),
        ("safety", "safety_delta", "TRACE (SD)"),
        ("probe", "probe_delta", ""),
    )
}  # fmt: skip
"""Role of an eval -> the mean change of the evals with that role."""
INFO = (
    Info(name="citb_fr_initial", kind="drift", card=CARD, papers="CITB (FR on T_init)", needs=("pooled initial tasks",),
         convention="last ROUGE-L on the pooled test set of the tasks of the initial multi-task tuning"),
    Info(name="citb_fr_unseen", kind="drift", card=CARD, papers="CITB (FR on T_unseen)", needs=("pooled unseen tasks",),
         convention="last ROUGE-L on the pooled test set of the official SuperNI test tasks"),
)  # fmt: skip


def delta(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean change over evals of one scale: GD, IFD or SD, by which evals they are."""
    if len(before) != len(after):
        raise RequestError(f"{len(before)} values before and {len(after)} after; accepted: one of each for every eval")
    return mean(np.subtract(after, before), "evals")


def trace_op(R: Any) -> list[float | None]:
    """OP_t = mean over i <= t of R[t, i], t = 1..T (`aa`)."""
    return series(make_scores(R))["aa"]


def trace_bwt_over_t(R: Any) -> list[float | None]:
    """(1 / t) sum over i <= t of R[t, i] - R[i, i], t = 1..T (`bwt_over_T`); None at t = 1."""
    return series(make_scores(R))["bwt_over_T"]


def citb(R: Any, initial: float | None = None, unseen: float | None = None) -> dict[str, Found]:
    """CITB's numbers by the names they have here: AR is ``aa``, its backward transfer ``bwt_over_T_minus_1``, its
    forward transfer ``fwt_no_baseline``, its FR the last score on pooled tests of the initial and of unseen tasks."""
    found = explain(make_scores(R))
    pooled = {"citb_fr_initial": initial, "citb_fr_unseen": unseen}
    return {name: found[name] for name in ("aa", "bwt_over_T_minus_1", "fwt_no_baseline")} | {
        name: (None, "not measured") if value is None else (value, None) for name, value in pooled.items()
    }


def on_one_scale(scores: Any, ranges: Sequence[tuple[float, float]]) -> np.ndarray:
    """f64[..., E] scores as shares of their evals' ranges, so that they may be averaged (0 to 100 beside 0 to 1).

    RequestError where a range has no bound.
    """
    lo, hi = np.asarray(ranges, np.float64).T
    if not np.isfinite(hi - lo).all():
        odd = next(r for r in ranges if not np.isfinite(r[1] - r[0]))
        raise RequestError(f"a score from {odd[0]:g} to {odd[1]:g} cannot be put on one scale; accepted: finite ranges")
    return (np.asarray(scores, np.float64) - lo) / (hi - lo)
