"""Numbers of model editing, from per-token matches and stream scores. Card metrics/editing-metrics.

Reliability, generality and locality are the same mean over other prompts; WISE and EasyEdit read its "equal" in the two
ways below. ES, ERR and TRR are GRACE's (Hartvigsen et al. 2023); `counterfact` is ROME's table, `unlearning` Larimar's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, mean

Matches = Sequence[Sequence[float]]
"""For each edit, whether each token of its answer is the wanted one."""
OOD_LOSS = -np.log(0.8)
"""Below this loss an answer counts as generalised to other text (WISE, Temporal)."""


def token_match(matches: Matches) -> float:
    """Mean over edits of the share of right tokens (EasyEdit's default; partial credit)."""
    return mean([mean(m, "tokens of an edit") for m in matches], "edits")


def exact_match(matches: Matches) -> float:
    """Share of edits of which every token is right; never above `token_match`."""
    return mean([float(np.all(m)) for m in matches], "edits")


def average(reliability: float, generality: float, locality: float) -> float:
    """Mean of the three, of one reading (WISE's Avg)."""
    return (reliability + generality + locality) / 3


def ood_generality(losses: Sequence[float]) -> float:
    """Share of edits whose answer has a loss (nats, mean over its tokens) below -log 0.8 in other text (WISE)."""
    return mean(np.asarray(losses, np.float64) < OOD_LOSS, "edits")


class Stream(NamedTuple):
    """After each edit: edit_success, that of the last edit (ES); retention, the mean over all of them (ERR)."""

    edit_success: list[float]
    retention: list[float]


def stream(scores: Sequence[Sequence[float]]) -> Stream:
    """scores[t][s]: the task's metric on edit s after edit t, s = 0..t."""
    return Stream([row[-1] for row in scores], [float(np.mean(row)) for row in scores])


def edit_matrix(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """f64[T, T] of the same scores with the edits as tasks, NaN above the diagonal (an edit is not asked before it is
    made): what `jaxcl.metrics.matrix.cl_metrics` takes."""
    out = np.full((len(scores), len(scores)), np.nan)
    for t, row in enumerate(scores):
        if len(row) != t + 1:
            raise RequestError(f"{len(row)} scores after edit {t}; accepted: {t + 1}, one for each edit so far")
        out[t, : t + 1] = row
    return out


def retention_by_age(scores: Sequence[Sequence[float]]) -> list[float]:
    """Mean score of edits that are a = 0, 1, .. edits old; age 0 is the mean of ES."""
    R = edit_matrix(scores)
    return [float(np.mean(np.diagonal(R, -age))) for age in range(len(R))]


class Upstream(NamedTuple):
    """retention: mean metric on upstream test data after the edits (TRR); drop: that minus the mean before."""

    retention: float
    drop: float


def upstream(before: Sequence[float], after: Sequence[float]) -> Upstream:
    """Metric of each upstream item before and after."""
    return Upstream(mean(after, "upstream items"), mean(after, "upstream items") - mean(before, "upstream items"))


Pairs = Sequence[tuple[float, float]]
"""(probability of the new object, of the original one) for each prompt; logits for Larimar's M columns."""


def counterfact(rewrite: Pairs, paraphrase: Pairs, neighborhood: Pairs) -> dict[str, float]:
    """ES, PS: share of prompts where the new object is likelier; EM, PM: mean difference; NS, NM: on neighbours, the
    other way round; S: harmonic mean of ES, PS and NS, 0 where one of them is."""
    sides = {"E": (rewrite, 1.0), "P": (paraphrase, 1.0), "N": (neighborhood, -1.0)}
    gaps = {name: sign * -np.diff(np.asarray(pairs, np.float64), axis=1) for name, (pairs, sign) in sides.items()}
    found = {f"{name}S": float(np.mean(gap > 0)) for name, gap in gaps.items()}
    total = 3 / sum(1 / x for x in found.values()) if all(found.values()) else 0.0
    return {**found, **{f"{name}M": float(np.mean(gap)) for name, gap in gaps.items()}, "S": total}


class Unlearning(NamedTuple):
    """forgotten: mean recall of what was to be removed, wanted 0; retained: mean recall of the rest."""

    forgotten: Found
    retained: Found


def unlearning(recall: Sequence[float], removed: Sequence[bool]) -> Unlearning:
    """recall of each fact, and whether it was removed (Larimar, Das et al. 2024)."""
    if len(recall) != len(removed):
        raise RequestError(f"{len(recall)} recalls of {len(removed)} facts; accepted: one of each")
    sides = {kept: [r for r, gone in zip(recall, removed) if bool(gone) is not kept] for kept in (False, True)}
    names = {False: "no fact was removed", True: "no fact was kept"}
    found = {k: (mean(v, "facts"), None) if v else (None, f"undefined: {names[k]}") for k, v in sides.items()}
    return Unlearning(found[False], found[True])
