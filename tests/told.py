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


def same(a: tuple, b: tuple) -> bool:
    """Whether two outputs are equal bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
