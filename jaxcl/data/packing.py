"""Several rows in one sequence: first fit over the rows in the order in which they are drawn.

Every row keeps its own segment number and its own positions from 0, so that attention and nll are those of
the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcl.data.encode import Example

OPEN_BINS = 64
"""First fit looks at this many unfinished sequences: enough to fill them, and linear in the rows."""


def first_fit(lengths: Sequence[int], window: int, most: int) -> list[list[int]]:
    """Bins of at most ``window`` tokens and ``most`` rows, as lists of indices into ``lengths``, in order of
    their first row. A row longer than the window gets a bin of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    unfinished: list[int] = []
    for i, length in enumerate(lengths):
        at = next((b for b in unfinished if room[b] >= length), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room.append(window)
            unfinished = [*unfinished, at][-OPEN_BINS:]
        bins[at].append(i)
        room[at] -= length
        if len(bins[at]) == most or room[at] <= 0:
            unfinished.remove(at)
    return bins


def merge(examples: Sequence[Example], most: int) -> Example:
    """One example of window T from up to ``most`` that fit into it together.

    segments are numbered on from row to row (a block of several documents has several), positions stay each row's
    own, ``targets_at`` is shifted and grows to K * most (unused slots 0, weight 0). ``row`` is the first row's;
    ``rows`` i32[most] holds all, -1 where none.
    """
    packed = {name: np.zeros_like(examples[0][name]) for name in ("tokens", "segments", "positions")}
    window, at, segments = len(packed["tokens"]), 0, 0
    answers = "targets_at" in examples[0]
    k = len(examples[0]["weight"]) if answers else 0
    packed["weight"] = np.zeros(k * most if answers else window, np.float32)
    if answers:
        packed["targets_at"] = np.zeros(k * most, np.int32)
    for number, example in enumerate(examples):
        length = tokens_of(example)
        for name in ("tokens", "positions"):
            packed[name][at : at + length] = example[name][:length]
        packed["segments"][at : at + length] = segments + example["segments"][:length]
        segments += int(example["segments"].max())
        if answers:
            slots = slice(number * k, (number + 1) * k)
            packed["targets_at"][slots] = np.where(example["targets_at"] > 0, example["targets_at"] + at, 0)
            packed["weight"][slots] = example["weight"]
        else:
            packed["weight"][at : at + length] = example["weight"][:length]
        at += length
    rows = np.full(most, -1, np.int32)
    rows[: len(examples)] = [example["row"] for example in examples]
    return packed | {"row": rows[0], "rows": rows}


def tokens_of(example: Example) -> int:
    """How many tokens of the window are in use."""
    return int(np.count_nonzero(example["segments"]))
