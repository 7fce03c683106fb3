"""Perplexity, bits per byte and what was lost in nats. Card metrics/rouge-ppl.

Losses are compared as differences of mean nll, never of perplexities. N[t, i] is the mean nll of domain i after stage
t, N[0, i] before any; the formulas see their negatives (`Scores` is higher-is-better), so gains stay positive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix import METRICS, MetricInfo

CARD = "metrics/rouge-ppl"


def perplexity(mean_nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the token-weighted mean of chunks' mean nll (nats); tokens: how many were scored in each chunk."""
    counts = np.asarray(tokens, np.float64)
    if counts.shape != np.shape(mean_nll) or not counts.sum() > 0 or (counts < 0).any():
        raise RequestError(f"tokens={list(tokens)}; accepted: one count for each of {len(mean_nll)} chunks, not all 0")
    return float(np.exp(np.dot(mean_nll, counts) / counts.sum()))


def bits_per_byte(nats: float, size: int) -> float:
    """Summed nll of a text over its bytes (UTF-8), in bits: comparable between tokenizers."""
    if size < 1:
        raise RequestError(f"a text of {size} bytes; accepted: at least 1")
    return float(nats / (np.log(2) * size))


def relative_perplexity(after: float, before: float) -> float:
    """exp(after - before) of two mean nlls: below 1 is better (as TemporalWiki reports it)."""
    return float(np.exp(after - before))


def _nats(of: str, name: str, convention: str) -> MetricInfo:
    return dataclasses.replace(METRICS[of], name=name, convention=convention, papers="", kind="nats", card=CARD)


def _exp_of_mean_loss(values: np.ndarray) -> np.ndarray:
    return np.exp(-values)


_ROWS = (
    _nats("fgt_max", "fgt_max_nats", "mean over old domains of N[T,i] - min over l<T of N[l,i], in nats"),
    _nats("bwt_over_T_minus_1", "bwt_over_T_minus_1_nats", "sum over i<T of N[i,i] - N[T,i], divided by T-1, in nats"),
    _nats("fwt_vs_zero_shot", "fwt_vs_zero_shot_nats", "sum over i>=2 of N[0,i] - N[i-1,i], divided by T-1, in nats"),
    MetricInfo("ppl_final", "exp of the mean over domains of N[T,i]", "", lambda s: s.final,
               card=CARD, kind="nats", lower_is_better=True, then=_exp_of_mean_loss),
    MetricInfo("ppl_relative_to_start", "exp of the mean over domains of N[T,i] - N[0,i]: below 1 is better",
               "TemporalWiki (per domain)", lambda s: s.final - s.row0, ("row0",), card=CARD, kind="nats",
               lower_is_better=True, then=_exp_of_mean_loss),
)  # fmt: skip
NATS: dict[str, MetricInfo] = {m.name: m for m in _ROWS}
"""Of matrices whose task evals all have the metric ``nll`` (nats per token) or ``perplexity`` (its exponential)."""
