"""Rewards, preferences, and what alignment cost elsewhere.

Cards refine-align/rlhf-pieces and refine-align/alignment-tax-model-averaging. The reward matrix R[t, i] is the mean
reward of objective i after stage t; rewards of different models are brought to one scale before
`jaxcl.metrics.matrix` averages them, and the raw ones are kept beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, Info, mean

_PIECES, _TAX = "refine-align/rlhf-pieces", "refine-align/alignment-tax-model-averaging"
INFO = (
    Info(name="reward_normalized", kind="alignment", card=_PIECES, needs=("rewards of the SFT and the oracle model",),
         convention="(r - r_SFT) / (r_oracle - r_SFT), objective by objective: 0 as SFT, 1 as the oracle"),
    Info(name="win_rate", kind="alignment", card=_PIECES, papers="TRACE (judge), AlpacaEval", needs=("verdicts",),
         convention="(wins + ties / 2) / all verdicts against the initial model; the judge is part of the result"),
    Info(name="preference_accuracy", kind="alignment", card=_PIECES, papers="Ouyang et al. 2022, DPO",
         needs=("scores of chosen and rejected answers",),
         convention="share of pairs whose chosen answer scores higher than the rejected one, ties count half"),
    Info(name="preference_margin", kind="alignment", card=_PIECES, papers="DPO",
         needs=("scores of chosen and rejected answers",),
         convention="mean score of the chosen answer minus that of the rejected one"),
    Info(name="alignment_tax", kind="alignment", card=_TAX, papers="Lin et al. 2024", lower_is_better=True,
         needs=("NLP evals before and after alignment",),
         convention="mean over NLP evals of one scale of the score before alignment minus that after"),
)  # fmt: skip


def reward_normalized(rewards: Any, sft: Any, oracle: Any) -> np.ndarray:
    """(rewards - sft) / (oracle - sft) over the last axis, f64[..., K]; NaN, "not measured" to a matrix, where an
    objective's two references are equal and so give no scale."""
    span = np.asarray(oracle, np.float64) - np.asarray(sft, np.float64)
    return (np.asarray(rewards, np.float64) - np.asarray(sft, np.float64)) / np.where(span == 0, np.nan, span)


def win_rate(wins: int, ties: int, losses: int) -> Found:
    """A tie is half a win."""
    if min(wins, ties, losses) < 0:
        raise RequestError(f"{wins} wins, {ties} ties, {losses} losses; accepted: counts")
    n = wins + ties + losses
    return ((wins + ties / 2) / n, None) if n else (None, "undefined: no verdict")


def _margins(chosen: Any, rejected: Any) -> np.ndarray:
    a, b = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if a.shape != b.shape:
        raise RequestError(f"scores of shapes {a.shape} and {b.shape}; accepted: one chosen for each rejected answer")
    return a - b


def preference_accuracy(chosen: Any, rejected: Any) -> float:
    """f[n] scores of each pair's two answers."""
    return mean((1 + np.sign(_margins(chosen, rejected))) / 2, "pairs")


def preference_margin(chosen: Any, rejected: Any) -> float:
    return mean(_margins(chosen, rejected), "pairs")


def alignment_tax(before: Sequence[float], after: Sequence[float]) -> float:
    """Scores of the NLP evals, higher is better and of one scale; positive: alignment cost something."""
    return mean(_margins(before, after), "evals")


def pareto_front(points: Any) -> list[int]:
    """Indices of f[n, m] (every column higher is better) that no other point beats in one column without losing in
    another: reward against tax over the ratios of an average, never one point of it."""
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or np.isnan(points).any():
        raise RequestError(f"points of shape {points.shape}; accepted: measured points x objectives")
    beaten = (points[:, None] <= points[None]).all(-1) & (points[:, None] < points[None]).any(-1)
    return [int(i) for i in np.flatnonzero(~beaten.any(1))]


def hma_ratios(logits: Any, pre_weight: float, spread: float = 0.2) -> np.ndarray:
    """Shares of the model before alignment in each of K layer groups: pre_weight * s / mean(s), s = sigmoid(logits) +
    spread. Their mean is pre_weight whatever the logits (Lin et al. 2024, arXiv 2309.06256, code).

    RequestError where a ratio leaves 0..1, which a large pre_weight allows.
    """
    s = 1 / (1 + np.exp(-np.asarray(logits, np.float64))) + spread
    ratios = pre_weight * s / s.mean()
    if ratios.min() < 0 or ratios.max() > 1:
        raise RequestError(f"pre_weight={pre_weight} gives a ratio of {ratios.max():.3f}; accepted: ratios from 0 to 1")
    return ratios
