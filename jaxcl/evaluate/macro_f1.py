"""Macro-F1 of a classification that was already made: classes weigh the same, however few rows they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxcl.evaluate.base import Eval, Item, Progress, accepted, shared


def with_macro_f1(accuracy: Eval, rows: Sequence[dict[str, Any]]) -> list[Eval]:
    """[``accuracy`` as it is, the eval ``<id>/f1_macro``], one pass for both.

    accuracy: an eval over ``rows`` whose predictions are classes, such as label ranking. An item's parts are true
    positives, false positives and false negatives of each class that occurs among the rows' ``labels``, sorted.
    """
    classes = sorted({label for row in rows for label in row.get("labels") or accepted(row)})
    once = shared(accuracy.run)

    def run(view: Any, progress: Progress) -> list[Item]:
        return [item | {"parts": counts(item["prediction"], row["target"], classes)}
                for item, row in zip(once(view, progress), rows)]  # fmt: skip

    second = dataclasses.replace(
        accuracy, id=f"{accuracy.id}/f1_macro", metric="f1_macro", run=run, pool="f1_macro", chance=None
    )
    return [dataclasses.replace(accuracy, run=once), second]


def counts(prediction: str, target: str, classes: Sequence[str]) -> list[float]:
    """Three numbers a class: it was right, it was said wrongly, it was missed."""
    out: list[float] = []
    for name in classes:
        said, true = prediction == name, target == name
        out += [float(said and true), float(said and not true), float(true and not said)]
    return out
