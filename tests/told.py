"""A task-incremental run that keeps, bit for bit, what the model gives on rows of every task after every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
from support import Answers, Done, run

from jaxcl.core.types import Method, Outputs
from jaxcl.data.pipeline import batches
from jaxcl.data.stage import Stage
from jaxcl.evaluate.base import Eval


def outputs(apply, head, spec, params, batch):
    out: Outputs = apply(spec, params, batch)
    return out.nll, out.hidden


def rows(task: int) -> dict:
    """Eight training rows of a task, as a test sees them."""
    batch = next(batches(Answers(f"s{task}", 8, seed=task), None, 8))
    return {k: v for k, v in batch.items() if k not in ("row", "stage", "source")}


def recorder(task: int, seen: list) -> Eval:
    """An eval that keeps (nll, hidden) of the task's rows."""

    def evaluate(view, progress):
        nll, hidden = (np.asarray(x) for x in view.call(outputs, rows(task)))
        seen.append((nll, hidden))
        return [{"id": str(i), "prediction": None, "score": float(x.sum())} for i, x in enumerate(nll)]

    return Eval(f"e{task}", "nll", 8, evaluate, higher_is_better=False, range=(0.0, float("inf")))


def watched(methods: list[Method], out: Path, tasks: int = 3, **kw: Any) -> tuple[Done, list[list]]:
    """(the run, [task][row of the matrix] -> outputs) of short stages under weight decay."""
    seen: list[list] = [[] for _ in range(tasks)]
    stages = [Stage(f"s{t}", Answers(f"s{t}", 16, seed=t), evals=(f"e{t}",)) for t in range(tasks)]
    evals = [recorder(t, seen[t]) for t in range(tasks)]
    return run(methods, out, stages=stages, evals=evals, **{"tx": optax.adamw(0.05), **kw}), seen


def check_past_tasks(told: tuple[Done, list[list]], close: float = 1e-5) -> None:
    """Three tasks, a bank for two: a task is the bare model until it is learned, then stays bit for bit while the bank
    has room, and to ``close`` in the program with the doubled bank."""
    done, seen = told
    for task in range(3):
        first, *after = seen[task]
        for stage in range(task):
            np.testing.assert_allclose(after[stage][0], first[0], atol=1e-5, err_msg="not learned: the bare model")
        assert np.abs(after[task][0] - first[0]).max() > 1e-3, "learned"
    assert same(seen[0][1], seen[0][2]) and done.compilations == 2
    for task in range(2):
        np.testing.assert_allclose(seen[task][3][0], seen[task][2][0], atol=close)


def same(a: tuple, b: tuple) -> bool:
    """Whether two outputs are equal bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
