"""Numbers of a test set that are no mean of its items' scores: each item gives parts, and the sums make the number.

A corpus score is a function of sums (tokens and their nll, true and false positives, matching n-grams), so the same
function serves the whole set, and any resample of its items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.errors import unknown

Pool = Callable[[np.ndarray], np.ndarray]
"""f64[..., P], parts summed over items -> f64[...]; NaN where the sums define nothing."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """Parts (amount, count): amount over count, such as nats per token."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def exp_ratio(sums: np.ndarray) -> np.ndarray:
    """Parts (nats, tokens): perplexity, weighted by tokens."""
    return np.exp(ratio(sums))


def f1_micro(sums: np.ndarray) -> np.ndarray:
    """Parts (true positives, false positives, false negatives): F1 of all classes together; 0: nothing right."""
    right, wrong, missed = np.moveaxis(sums, -1, 0)
    return 2 * right / np.maximum(2 * right + wrong + missed, 1)


def f1_macro(sums: np.ndarray) -> np.ndarray:
    """Three parts a class, as `f1_micro`: mean F1 over the classes that occur or are predicted; NaN where none does."""
    classes = sums.reshape(*sums.shape[:-1], -1, 3)
    there = classes.sum(-1) > 0
    with np.errstate(invalid="ignore"):
        return np.where(there.any(-1), (f1_micro(classes) * there).sum(-1) / there.sum(-1), np.nan)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Parts (length, reference length, 4 matches, 4 totals): sacrebleu's corpus BLEU, 0 to 100, with its default
    exponential smoothing (Papineni et al. 2002; Post 2018)."""
    from sacrebleu.metrics import BLEU

    def one(parts: np.ndarray) -> float:
        length, wanted, *counts = (round(float(x)) for x in parts)
        return BLEU.compute_bleu(counts[:4], counts[4:], length, wanted, smooth_method="exp").score

    return np.apply_along_axis(one, -1, sums)


def chrf(sums: np.ndarray) -> np.ndarray:
    """Three parts (in the text, in the reference, in both) for each length of character n-gram: sacrebleu's chrF2,
    0 to 100 (Popovic 2015). Precision and recall are means over the lengths that both sides have."""
    grams = sums.reshape(*sums.shape[:-1], -1, 3)
    made, wanted, both = np.moveaxis(grams, -1, 0)
    there = (made > 0) & (wanted > 0)
    count = np.maximum(there.sum(-1), 1)
    precision = np.where(there, both / np.maximum(made, 1), 0).sum(-1) / count
    recall = np.where(there, both / np.maximum(wanted, 1), 0).sum(-1) / count
    total = 4 * precision + recall
    return 100 * np.where(total > 0, 5 * precision * recall / np.where(total > 0, total, 1), 0)


POOLS: dict[str, Pool] = {f.__name__: f for f in (ratio, exp_ratio, f1_micro, f1_macro, bleu, chrf)}


def pool_named(name: str | None, where: str = "") -> Pool:
    """The function of a name; None: the mean, of parts (score, 1). Raises RequestError where there is no such pool."""
    if name is None:
        return ratio
    if name not in POOLS:
        raise unknown("pool", name, POOLS, where=where)
    return POOLS[name]


def parts_of(item: Mapping[str, Any], pool: str | None) -> list[float]:
    """What an item adds to the sums."""
    return [float(item["score"]), 1.0] if pool is None else [float(x) for x in item["parts"]]


def pooled(items: Sequence[Mapping[str, Any]], pool: str | None = None) -> float | None:
    """The number of a test set; None where there are no items, or it is not finite."""
    if not items:
        return None
    sums = np.asarray(np.sum([parts_of(i, pool) for i in items], axis=0, dtype=np.float64))
    value = float(pool_named(pool)(sums))
    return value if math.isfinite(value) else None
