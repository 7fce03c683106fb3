"""What an evaluation is: a fixed set of test rows and a function that scores a model on them.

Test rows live here and nowhere else; training reads stages, which hold none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxcl.errors import RequestError

T = TypeVar("T")
Item = dict[str, Any]
"""{'id', 'prediction', 'score'}: what is kept of one test row; with 'parts', numbers, where the eval is pooled."""


class Progress(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Eval:
    """run(view, progress) -> one `Item` per test row, in their order; the eval's number is the mean of their scores,
    or what ``pool`` (a name of `jaxcl.metrics.pooling.POOLS`) makes of the sums of their parts.

    n: number of test rows. range: the lowest and highest score (math.inf: no bound). role: 'task', 'general'
    or 'probe'. chance: the score of a guess, where there is one; it becomes the matrix file's ``random``. hparams: how
    it asks (temperature, seed, ...), JSON, written into the matrix file.
    """

    id: str
    metric: str
    n: int
    run: Callable[[Any, Progress], list[Item]]
    higher_is_better: bool = True
    range: tuple[float, float] = (0.0, 1.0)
    role: str = "task"
    chance: float | None = None
    pool: str | None = None
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def shared(run: Callable[[Any, Progress], T]) -> Callable[[Any, Progress], T]:
    """``run`` that remembers its last result, so that several evals can read one pass over the same weights."""
    last: list[tuple[Any, T]] = []

    def once(view: Any, progress: Progress) -> T:
        state = (view.stamp, view.task)
        if not last or last[0][0] != state:
            last[:] = [(state, run(view, progress))]
        return last[0][1]

    return once


def stage_of(view: Any, own: int = 0) -> int:
    """The stage at which candidates are asked for: the run's present one, at least the eval's ``own``."""
    return max(int(view.clock.stage), own) if view.clock is not None else own


def bucket(length: int, most: int) -> int:
    """The smallest of 32, 64, 128, ... that holds ``length``, at most ``most``: few shapes."""
    size = 32
    while size < length:
        size *= 2
    return max(min(size, most), length)


def grouped(sizes: Sequence[int], batch_size: int) -> Iterable[tuple[int, list[int]]]:
    """(size, rows of one batch) over all rows, equal sizes together, the smallest first.

    The last batch of a size may be short; fill it to ``batch_size``, so that every size has one shape.
    """
    for size in sorted(set(sizes)):
        members = [i for i, s in enumerate(sizes) if s == size]
        for at in range(0, len(members), batch_size):
            yield size, members[at : at + batch_size]


def filled(arrays: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """[batch_size, ...]: the rows, then the first one again where they are too few."""
    return np.stack([*arrays, *[arrays[0]] * (batch_size - len(arrays))])


def accepted(row: dict[str, Any]) -> list[str]:
    """The answers that count as right."""
    return row.get("targets") or [row["target"]]


def check_items(eval_id: str, rows: Sequence[dict[str, Any]], batch_size: int) -> None:
    """RequestError where an eval has no rows, an id twice, or a batch size below one."""
    if not rows:
        raise RequestError(f"eval {eval_id!r} has no test rows")
    if batch_size < 1:
        raise RequestError(f"eval {eval_id!r}: batch_size={batch_size}; accepted: a positive integer")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise RequestError(f"eval {eval_id!r}: id {twice!r} occurs twice")
