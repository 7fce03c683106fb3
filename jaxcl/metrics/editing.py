"""Numbers of model editing, from per-token matches and stream scores. Card metrics/editing-metrics.

Reliability, generality and locality are the same mean over other prompts; WISE and EasyEdit read its "equal" in the two
ways below. ES, ERR and TRR are GRACE's (Hartvigsen et al. 2023); the last function is ROME's table for CounterFact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Matches = Sequence[Sequence[float]]
"""For each edit, whether each token of its answer is the wanted one."""


def token_match(matches: Matches) -> float:
    """Mean over edits of the share of right tokens (EasyEdit's default; partial credit)."""
    return float(np.mean([np.mean(m) for m in matches]))


def exact_match(matches: Matches) -> float:
    """Share of edits of which every token is right; never above `token_match`."""
    return float(np.mean([np.all(m) for m in matches]))


class Stream(NamedTuple):
    """After each edit: edit_success, that of the last edit (ES); retention, the mean over all of them (ERR)."""

    edit_success: list[float]
    retention: list[float]


def stream(scores: Sequence[Sequence[float]]) -> Stream:
    """scores[t][s]: the task's metric on edit s after edit t, s = 0..t."""
    return Stream([row[-1] for row in scores], [float(np.mean(row)) for row in scores])


class Upstream(NamedTuple):
    """retention: mean metric on upstream test data after the edits (TRR); drop: that minus the mean before."""

    retention: float
    drop: float


def upstream(before: Sequence[float], after: Sequence[float]) -> Upstream:
    """Metric of each upstream item before and after."""
    return Upstream(float(np.mean(after)), float(np.mean(after) - np.mean(before)))


Pairs = Sequence[tuple[float, float]]
"""(probability of the new object, of the original one) for each prompt."""


def counterfact(rewrite: Pairs, paraphrase: Pairs, neighborhood: Pairs) -> dict[str, float]:
    """ES, PS: share of prompts where the new object is likelier; EM, PM: mean difference; NS, NM: on neighbours, the
    other way round; S: harmonic mean of ES, PS and NS, 0 where one of them is."""
    sides = {"E": (rewrite, 1.0), "P": (paraphrase, 1.0), "N": (neighborhood, -1.0)}
    gaps = {name: sign * -np.diff(np.asarray(pairs, np.float64), axis=1) for name, (pairs, sign) in sides.items()}
    found = {f"{name}S": float(np.mean(gap > 0)) for name, gap in gaps.items()}
    total = 3 / sum(1 / x for x in found.values()) if all(found.values()) else 0.0
    return {**found, **{f"{name}M": float(np.mean(gap)) for name, gap in gaps.items()}, "S": total}
