"""Continual model refinement: five numbers of a stream of answers, errors and repairs, and their summary OEC.

Lin et al. 2022 (CMR, arXiv 2205.02014); card metrics/cmr-metrics. At step t the model f_{t-1} answers Q_t, is repaired
on what it got wrong, and becomes f_t. All but EFR are measured on f_{t-1}, so f_T never is: ``*_after`` adds that.
Right is an exact match of the written answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, Info, mean_of_found

CARD = "metrics/cmr-metrics"
T = TypeVar("T")
HELD_OUT = {
    "ukr": "the fixed upstream sample",
    "okr": "the sample of past submissions, right and wrong ones",
    "kg": "the held-out out-of-distribution set",
}


class Step(NamedTuple):
    """queries |Q_t|, errors |E_t| of f_{t-1} among them, fixed: errors that f_t answers right. ukr, okr, kg: accuracy
    of f_{t-1} on the held-out sets at the start of the step, None where they were not measured."""

    queries: int
    errors: int
    fixed: int
    ukr: float | None = None
    okr: float | None = None
    kg: float | None = None


def efr(step: Step) -> Found:
    """Share of the errors that the repair fixed."""
    return (step.fixed / step.errors, None) if step.errors else (None, "undefined: there was no error to fix")


def success(steps: Sequence[Step]) -> list[float]:
    """SR_t: share of each step's queries answered right before the repair."""
    return [1 - step.errors / step.queries for step in steps]


def cumulative_success(steps: Sequence[Step]) -> list[float]:
    """CSR_t: share of all queries up to t answered right before the repairs."""
    errors, queries = (np.cumsum([getattr(step, name) for step in steps]) for name in ("errors", "queries"))
    return [float(x) for x in 1 - errors / queries]


def past_sample(history: Sequence[T], size: int, *, seed: int, step: int) -> list[T] | None:
    """The ``size`` past submissions that OKR asks at a step, right and wrong ones alike: a fresh draw a step, the same
    for all methods that saw the same stream; None while there are too few."""
    if len(history) < size:
        return None
    drawn = np.random.default_rng([seed, step]).choice(len(history), size, replace=False)
    return [history[i] for i in sorted(drawn)]


def refinement(steps: Sequence[Step], after: Mapping[str, float] | None = None) -> dict[str, Found]:
    """Every number of a run: {name: (value, None) or (None, reason)}. after: 'ukr', 'okr', 'kg' of the model after the
    last repair. OEC leaves EFR out; a method that fixes nothing looks good in it, so read both (the authors ask for a
    mean EFR of 0.9). RequestError where counts contradict each other."""
    _check(steps)
    out: dict[str, Found] = {
        "efr_mean": mean_of_found([efr(step) for step in steps], "step's error-fixing rate"),
        "csr": (cumulative_success(steps)[-1], None),
    }
    for name in HELD_OUT:
        measured = [_measured(getattr(step, name), "after this step") for step in steps]
        out[name] = _measured(getattr(steps[-1], name), "at the last step")
        out[f"{name}_mean"] = mean_of_found(measured, "measurement")
        out[f"{name}_after"] = _measured((after or {}).get(name), "after the last repair")
    out["oec"] = _all_of(out, "csr", *HELD_OUT)
    out["oec_after"] = _all_of(out, "csr", *(f"{name}_after" for name in HELD_OUT))
    return out


def _measured(value: float | None, when: str) -> Found:
    return (None, f"not measured {when}") if value is None else (float(value), None)


def _all_of(found: Mapping[str, Found], *names: str) -> Found:
    values = [found[name][0] for name in names]
    missing = [name for name, value in zip(names, values) if value is None]
    if missing:
        return None, "needs " + ", ".join(missing)
    return float(np.mean([v for v in values if v is not None])), None


def _check(steps: Sequence[Step]) -> None:
    if not steps:
        raise RequestError("a refinement stream without steps; accepted: at least one")
    for t, step in enumerate(steps, 1):
        if not (0 <= step.fixed <= step.errors <= step.queries and step.queries > 0):
            counts = f"{step.queries} queries, {step.errors} errors, {step.fixed} fixed"
            raise RequestError(f"step {t} has {counts}; accepted: 0 <= fixed <= errors <= queries, queries > 0")


def _info(name: str, convention: str, *needs: str, papers: str = "CMR") -> Info:
    return Info(name=name, convention=convention, kind="refinement", card=CARD, papers=papers, needs=needs)


INFO = (
    _info("efr_mean", "mean over steps with errors of the share of E_t that f_t answers right", "a refinement stream"),
    _info("csr", "1 - all errors / all queries up to T, before the repairs", "a refinement stream"),
    *(_info(name, f"accuracy of f_(T-1) on {what}", f"accuracy on {what}") for name, what in HELD_OUT.items()),
    *(_info(f"{name}_mean", f"mean over the measured steps t of {name} on f_(t-1)", f"accuracy on {what}")
      for name, what in HELD_OUT.items()),
    *(_info(f"{name}_after", f"accuracy of f_T, after the last repair, on {what}", f"accuracy on {what}", papers="")
      for name, what in HELD_OUT.items()),
    _info("oec", "mean of ukr, okr, csr and kg at T; efr_mean is left out and read beside it", *HELD_OUT),
    _info("oec_after", "as oec, with ukr_after, okr_after and kg_after", *HELD_OUT, papers=""),
)  # fmt: skip
