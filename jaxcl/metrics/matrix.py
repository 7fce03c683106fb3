"""Every number that is computed from an accuracy matrix, each under the name of its convention.

R[t, i] is the score on task i after stage t, higher is better (negate losses first, as
`jaxcl.metrics.score` does). The formulas accept leading axes, so that a bootstrap evaluates thousands of
resampled matrices at once. Nothing here is called plain "forgetting", "BWT" or "FWT": papers that use
these words divide by different numbers and compare with different stages.

A task is an eval, and its own stage is the first one that teaches it: ``learned[i]``. With one eval a
stage this is the square matrix of the literature, task i learned at stage i. A stage that teaches several
evals counts once for each of them, and "/ T" then reads "/ number of tasks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found

CARD = "metrics/accuracy-matrix"
_NULL = "a cell or baseline that it averages over was not measured"


class Scores(NamedTuple):
    """What a formula sees: T stages done, K tasks learned so far, any leading axes on R and row0.

    R f64[..., T, K]; learned i64[K] in 0..T-1; the baselines f64[..., K] or None; NaN: not measured.
    """

    R: np.ndarray
    learned: np.ndarray
    row0: np.ndarray | None = None
    random: np.ndarray | None = None
    single: np.ndarray | None = None
    joint: np.ndarray | None = None

    @property
    def last(self) -> int:
        return self.R.shape[-2] - 1

    @property
    def final(self) -> np.ndarray:
        """[..., K], after the last stage."""
        return self.R[..., -1, :]

    @property
    def own(self) -> np.ndarray:
        """[..., K], each task right after its own stage: the diagonal of a square matrix."""
        return self.R[..., self.learned, np.arange(len(self.learned))]

    @property
    def before(self) -> np.ndarray:
        """[..., K'], the tasks of stage 2 and later, each just before its own stage."""
        late = np.flatnonzero(self.late)
        return self.R[..., self.learned[late] - 1, late]

    @property
    def old(self) -> np.ndarray:
        return self.learned < self.last

    @property
    def late(self) -> np.ndarray:
        return self.learned > 0


@dataclass(frozen=True)
class MetricInfo:
    """A metric: the mean of ``terms`` over the last axis, or with ``over_T`` their sum / number of tasks; ``then`` of
    that."""

    name: str
    convention: str
    papers: str
    terms: Callable[[Scores], np.ndarray]
    needs: tuple[str, ...] = ()
    over_T: bool = False
    undefined: str = "undefined: no task was learned before the last stage"
    card: str = CARD
    lower_is_better: bool = False
    kind: str = "matrix"
    then: Callable[[np.ndarray], np.ndarray] | None = None

    def of(self, s: Scores) -> tuple[np.ndarray | None, str | None]:
        """(value f64[...] with NaN where unmeasured, None), or (None, the reason)."""
        if not len(s.learned):
            return None, "undefined: no stage that teaches a task has been evaluated"
        for need in self.needs:
            if getattr(s, need) is None:
                return None, f"needs {need}"
        terms = self.terms(s)
        if not terms.shape[-1]:
            return None, self.undefined
        value = terms.sum(-1) / (len(s.learned) if self.over_T else terms.shape[-1])
        return (self.then(value) if self.then else value), None


def _aa_per_stage(s: Scores) -> np.ndarray:
    first = int(s.learned.min())
    return np.stack([s.R[..., t, s.learned <= t].mean(-1) for t in range(first, s.last + 1)], -1)


def _best(s: Scores, *, since_learned: bool = False, including_last: bool = False) -> np.ndarray:
    """[..., K'] best score of each old task over stages before the last (or up to it)."""
    stages = s.R[..., : s.last + including_last, :]
    if since_learned:
        stages = np.where(np.arange(stages.shape[-2])[:, None] >= s.learned, stages, -np.inf)
    return stages[..., s.old].max(-2)


def _fall(**which: bool) -> Callable[[Scores], np.ndarray]:
    return lambda s: _best(s, **which) - s.final[..., s.old] if s.old.any() else s.final[..., s.old]


def _gain(s: Scores) -> np.ndarray:
    return (s.final - s.own)[..., s.old]


def _over(name: str) -> Callable[[Scores], np.ndarray]:
    return lambda s: s.before - getattr(s, name)[..., s.late]


_FIRST_ONLY = "undefined: no task is learned after the first stage"
_ROWS = (
    MetricInfo("aa", "AA_T = Last = ACC = AP = OP_T: mean over tasks of R[T,i]",
               "GEM, TRACE, CITB (AR), SAPT (AP)", lambda s: s.final),
    MetricInfo("aia", "mean over stages t of AA_t (average incremental accuracy, MAA)",
               "CoIN (MAA)", _aa_per_stage),
    MetricInfo("fgt_max", "mean over old tasks of max over l<T of R[l,i], minus R[T,i]",
               "Chaudhry 2018, SAPT, DSI++", _fall(), lower_is_better=True),
    MetricInfo("fgt_max_since_learned", "as fgt_max, but the max starts at the task's own stage: i<=l<T",
               "", _fall(since_learned=True), lower_is_better=True),
    MetricInfo("fgt_max_including_T", "as fgt_max, but the max includes T: never negative",
               "", _fall(including_last=True), lower_is_better=True),
    MetricInfo("fgt_diag", "mean over old tasks of R[i,i] - R[T,i] (= -bwt_over_T_minus_1)",
               "Avalanche", lambda s: -_gain(s), lower_is_better=True),
    MetricInfo("bwt_over_T_minus_1", "sum over old tasks of R[T,i] - R[i,i], divided by T-1",
               "GEM paper, CITB", _gain),
    MetricInfo("bwt_over_T", "sum over old tasks of R[T,i] - R[i,i], divided by T",
               "GEM code, TRACE, CoIN, SAPT", _gain, over_T=True),
    MetricInfo("fwt_vs_random_over_T_minus_1", "sum over i>=2 of R[i-1,i] - random[i], divided by T-1",
               "GEM paper", _over("random"), ("random",), undefined=_FIRST_ONLY),
    MetricInfo("fwt_vs_random_over_T", "sum over i>=2 of R[i-1,i] - random[i], divided by T",
               "GEM code", _over("random"), ("random",), over_T=True, undefined=_FIRST_ONLY),
    MetricInfo("fwt_vs_zero_shot", "sum over i>=2 of R[i-1,i] - R[0,i], divided by T-1",
               "Avalanche", _over("row0"), ("row0",), undefined=_FIRST_ONLY),
    MetricInfo("fwt_no_baseline", "sum over i>=2 of R[i-1,i], divided by T-1",
               "CITB", lambda s: s.before, undefined=_FIRST_ONLY),
    MetricInfo("fwt_plasticity", "mean of R[i,i] - single[i]: the own-stage score against one model per task",
               "SAPT", lambda s: s.own - s.single, ("single",)),
    MetricInfo("learning_accuracy", "mean of R[i,i] over all tasks",
               "", lambda s: s.own),
    MetricInfo("learning_accuracy_without_first", "mean of R[i,i] over i>=2",
               "DSI++", lambda s: s.own[..., s.late], undefined=_FIRST_ONLY),
    MetricInfo("intransigence_last", "joint - R[T,T] on the tasks of the last stage",
               "Chaudhry 2018", lambda s: (s.joint - s.own)[..., ~s.old], ("joint",),
               undefined="undefined: the last stage teaches no new task", lower_is_better=True),
    MetricInfo("intransigence_mean", "mean of joint - R[i,i] over all tasks",
               "", lambda s: s.joint - s.own, ("joint",), lower_is_better=True),
    MetricInfo("zero_shot_gain", "mean of R[T,i] - R[0,i]: what training gave in all",
               "", lambda s: s.final - s.row0, ("row0",)),
)  # fmt: skip
METRICS: dict[str, MetricInfo] = {m.name: m for m in _ROWS}
SERIES = ("aa", "fgt_max", "bwt_over_T_minus_1", "bwt_over_T")
"""Metrics that are also reported at every stage: T replaced by t."""


def make_scores(
    R: Any,
    row0: Any = None,
    random: Any = None,
    single: Any = None,
    joint: Any = None,
    learned: Sequence[int] | np.ndarray | None = None,
) -> Scores:
    """Checks the shapes and keeps the tasks whose own stage is done (all others are still unseen).

    R: [..., T, K]; baselines [..., K] or None; learned: 0-based own stage of every task, default 0..K-1.
    Raises RequestError when the shapes disagree.
    """
    R = np.asarray(R, np.float64)
    if R.ndim < 2:
        raise RequestError(f"the accuracy matrix has shape {R.shape}; accepted: stages x tasks")
    stages, tasks = R.shape[-2:]
    own = np.arange(tasks) if learned is None else np.asarray(learned, np.int64)
    if own.shape != (tasks,):
        raise RequestError(f"{len(own)} own stages for {tasks} tasks; accepted: one for each task")
    if learned is None and stages > tasks:
        raise RequestError(f"{stages} stages but {tasks} tasks; accepted: learned=, each task's own stage")
    seen = own < stages
    rows: dict[str, np.ndarray | None] = {}
    for name, row in (("row0", row0), ("random", random), ("single", single), ("joint", joint)):
        values = None if row is None else np.asarray(row, np.float64)
        if values is not None and values.shape[-1:] != (tasks,):
            raise RequestError(f"{name} has shape {values.shape}; accepted: {tasks} values, one a task")
        rows[name] = None if values is None else values[..., seen]
    return Scores(R[..., seen], own[seen], **rows)


def explain(s: Scores, metrics: Mapping[str, MetricInfo] | None = None) -> dict[str, Found]:
    """{metric: (value, None) or (None, reason)} of one matrix; never averages over unmeasured cells."""
    out: dict[str, Found] = {}
    for name, info in (METRICS if metrics is None else metrics).items():
        value, reason = info.of(s)
        missing = value is None or bool(np.isnan(value))
        out[name] = (None, reason or _NULL) if missing else (float(np.asarray(value)), None)
    return out


def series(s: Scores) -> dict[str, list[float | None]]:
    """{metric: one value a stage}: `SERIES` with T replaced by t; None where undefined or unmeasured."""
    out: dict[str, list[float | None]] = {name: [] for name in SERIES}
    for t in range(s.last + 1):
        seen = s.learned <= t
        upto = Scores(s.R[: t + 1, seen], s.learned[seen])
        for name in SERIES:
            value = METRICS[name].of(upto)[0]
            out[name].append(None if value is None or np.isnan(value) else float(value))
    return out


def cl_metrics(
    R: Any,
    row0: Any = None,
    random: Any = None,
    single: Any = None,
    joint: Any = None,
    *,
    learned: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """Every metric of one matrix R[T, K] (higher is better): {name: value, or None where undefined}.

    row0: before any training; random: chance; single: one model per task; joint: joint training up to
    the task's own stage; each f64[K]. NaN marks what was not measured. Raises RequestError on bad shapes.
    """
    scores = make_scores(R, row0, random, single, joint, learned)
    return {name: value for name, (value, _) in explain(scores).items()}
