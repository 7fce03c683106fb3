"""Splits as TensorFlow Datasets writes them, for data from anywhere: ``train[:1000]``, ``train[80%:]``, ``a+b``.

Slices are resolved to row numbers of the whole split before anything is read. So a row has one number, however it
is reached, and whether a test split shares rows with a training split can be seen from the numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxcl.errors import RequestError

_BOUND = r"-?\d[\d_]*%?"
_PART = re.compile(rf"([\w.-]+)(?:\[({_BOUND})?:({_BOUND})?\])?")
FORM = "'train', 'train[:1000]', 'train[10%:20%]', 'train[-500:]' or several joined by '+'"


class Span(NamedTuple):
    """Rows ``start`` up to before ``stop`` (None: to the end) of the split ``base``."""

    base: str
    start: int
    stop: int | None


def spans(split: str, size: Callable[[str], int], where: str) -> list[Span]:
    """The rows that ``split`` names, in its order. size(base) -> rows of a whole split, asked only for slices.

    Percentages are rounded to the nearest row, negative bounds count from the end, as in TFDS. RequestError, naming
    ``where``: another form, a slice that is empty or reaches beyond the split, a row named twice.
    """
    found: list[Span] = []
    for text in split.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise RequestError(f"{where}: split {split!r} has another form than {FORM}")
        base, start, stop = match.groups()
        span = Span(base, 0, None) if "[" not in text else _slice(base, start, stop, size(base), f"{where}: {text!r}")
        if shared([span], found):
            raise RequestError(f"{where}: split {split!r} names rows of {base!r} twice; accepted: {FORM}")
        found.append(span)
    return found


def shared(some: Sequence[Span], others: Sequence[Span]) -> str | None:
    """A split of which both hold a row, None where they have no row in common."""
    for a in some:
        for b in others:
            end = min((s for s in (a.stop, b.stop) if s is not None), default=None)
            if a.base == b.base and (end is None or max(a.start, b.start) < end):
                return a.base
    return None


def _slice(base: str, start: str | None, stop: str | None, size: int, where: str) -> Span:
    if start and stop and ("%" in start) != ("%" in stop):
        raise RequestError(f"{where}: one bound is in percent, the other in rows; accepted: {FORM}")
    first, last = _row(start, 0, size, where), _row(stop, size, size, where)
    if first >= last:
        raise RequestError(f"{where} holds no rows; the split has {size}")
    return Span(base, first, last)


def _row(bound: str | None, default: int, size: int, where: str) -> int:
    if bound is None:
        return default
    number = int(bound.rstrip("%"))
    row = round(number * size / 100.0) if bound.endswith("%") else number
    if abs(row) > size:
        raise RequestError(f"{where} reaches beyond the split, which has {size} rows")
    return row + size if row < 0 else row
