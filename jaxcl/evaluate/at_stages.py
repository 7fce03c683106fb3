"""Evals that have something to ask at some stages only, or something else at each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxcl.evaluate.base import Eval, Item, Progress


def stages_done(view: Any) -> int:
    """How many stages the model has been trained on; 0: none. Before the first stage its clock stands still."""
    clock = view.clock
    return int(clock.stage) + 1 if int(clock.step) or int(clock.phase) else 0


def only(test: Eval, when: Callable[[int], bool]) -> Eval:
    """The eval where ``when(stages done)`` holds; elsewhere it has no items, and its cell in the matrix is null."""

    def run(view: Any, progress: Progress) -> list[Item]:
        return test.run(view, progress) if when(stages_done(view)) else []

    return dataclasses.replace(test, run=run)


def changing(eval_id: str, tests: Sequence[Eval | None]) -> Eval:
    """One eval that runs ``tests[stages done]``; None: nothing to ask. All have one number of items, whose ids are
    numbered here, since a row of the matrix asks others than the last; ``row`` in an item says which."""
    some = next(e for e in tests if e is not None)

    def run(view: Any, progress: Progress) -> list[Item]:
        test = tests[min(stages_done(view), len(tests) - 1)]
        items = test.run(view, progress) if test else []
        return [item | {"id": f"{eval_id}-{n}", "row": item["id"]} for n, item in enumerate(items)]

    return dataclasses.replace(some, id=eval_id, run=run)
