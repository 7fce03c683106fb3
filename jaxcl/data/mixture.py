"""Mixing as pure counting: which row of which stream stands where in a phase.

``share`` says how often a stream's rows are drawn relative to once per epoch: 1.0 draws each row once per
epoch, 0.1 a tenth of the rows, 2.0 each row twice. Replayed streams therefore add steps and every row of the
current stage is still seen ``epochs`` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.core.types import Stream


def draws(streams: Sequence[Stream], epochs: float) -> np.ndarray:
    """int64[S]: how many rows each stream gives in ``epochs``: round(rows * share * epochs)."""
    return np.array([round(len(s.rows) * s.share * epochs) for s in streams], np.int64)


def scaled(counts: np.ndarray, total: int) -> np.ndarray:
    """int64[S] that sum to ``total`` in proportion to ``counts`` (largest remainders, ties to the first)."""
    ideal = counts * (total / counts.sum())
    whole = np.floor(ideal).astype(np.int64)
    missing = total - int(whole.sum())
    whole[np.argsort(whole - ideal, kind="stable")[:missing]] += 1
    return whole


def interleave(counts: np.ndarray) -> np.ndarray:
    """int32[sum(counts)]: stream numbers, each stream spread evenly over the whole length."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    when = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts]) if len(counts) else np.zeros(0)
    return owner[np.argsort(when, kind="stable")]


def passes(rows: int, count: int, seed: Sequence[int], shuffle: bool = True) -> np.ndarray:
    """int64[count]: positions in 0..rows-1, every pass over them in another order, the last one cut off."""
    if not rows or not count:
        return np.zeros(0, np.int64)
    whole = -(-count // rows)
    if not shuffle:
        return np.tile(np.arange(rows), whole)[:count]
    each = [np.random.default_rng([*seed, p]).permutation(rows) for p in range(whole)]
    return np.concatenate(each)[:count]


def order(
    streams: Sequence[Stream], counts: np.ndarray, seed: Sequence[int], shuffle: bool = True
) -> np.ndarray:
    """int64[sum(counts), 2]: (stream number, position in its rows) of every draw of a phase.

    ``seed``: non-negative integers (run seed, stage, phase, ...); a stream's number is appended to them.
    """
    owner = interleave(counts)
    plan = np.empty((len(owner), 2), np.int64)
    plan[:, 0] = owner
    for i, stream in enumerate(streams):
        plan[owner == i, 1] = passes(len(stream.rows), int(counts[i]), (*seed, i), shuffle)
    return plan


def main_steps(streams: Sequence[Stream], epochs: float, batch_size: int) -> int:
    """Steps in which the streams of ``into='main'`` give every row its ``epochs`` times ``share`` draws."""
    total = int(draws([s for s in streams if s.into == "main"], epochs).sum())
    if total < 1:
        raise RequestError(f"the main streams hold no rows for epochs={epochs}; give rows, or Phase.steps")
    return -(-total // batch_size)
