"""Named entity recognition by writing: strict span F1 over the entity types seen so far. Card cft/continual-ner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.spans import counts, read_answer, spans_of
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.answers import Answer
from jaxcl.evaluate.base import Eval, Item, Progress, shared, stage_of
from jaxcl.evaluate.generation import written
from jaxcl.metrics.pooling import pooled

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

POOLS = ("f1_micro", "f1_macro")


def span_f1(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    types: Sequence[str],
    types_at: Callable[[int], Sequence[str]] | None = None,
    stage: int = 0,
    by: Sequence[str] = POOLS,
    role: str = "task",
    **how: Any,
) -> list[Eval]:
    """Strict span F1 of written answers (`jaxcl.data.spans`), of all entities ('f1_micro') and as the mean over types
    that occur or are predicted ('f1_macro'), from one pass; ids ``eval_id/f1_micro``, or ``eval_id`` for one of them.

    rows: ``instruct`` rows that keep their tokens and tags (`jaxcl.data.spans.instruct_row`). types: every type of the
    stream. types_at: those seen until a stage (default: all of them); the stage is the run's present one, at least the
    eval's own ``stage``. Entities of types not seen yet are left out of the tags, and ignored where they are predicted.
    how: as for `jaxcl.evaluate.generation.generation`. RequestError: also a type that the stream does not have.
    """
    for name in by:
        if name not in POOLS:
            raise unknown("mean of span F1", name, POOLS)
    for row in rows:
        if not {"tokens", "tags"} <= row.keys():
            raise RequestError(f"eval {eval_id!r}: row {row['id']!r} has no tokens and tags")
        for span in spans_of(row["tags"]):
            if span.type not in types:
                raise unknown("entity type", span.type, types, where=f"row {row['id']!r} of eval {eval_id!r}")
    answers = written(eval_id, rows, tokenizer, window=window, **how)

    def seen(view: Any) -> Sequence[str]:
        return types if types_at is None else types_at(stage_of(view, stage))

    return judged(eval_id, rows, answers, types, seen, by=by, role=role, hparams=answers.how.hparams())


def judged(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    answers: Callable[[Any, Progress], Sequence[Answer]],
    types: Sequence[str],
    counted: Callable[[Any], Collection[str]],
    *,
    by: Sequence[str],
    role: str,
    hparams: Mapping[str, Any],
) -> list[Eval]:
    """The evals of `span_f1` over answers that are written by ``answers``; counted(view): the types that count."""

    def judge(view: Any, progress: Progress) -> list[tuple[str, list[float]]]:
        """Of every row its answer, and 3 counts a type, in the order of ``types``; 0 for types that do not count."""
        seen = set(counted(view))
        return [
            (answer.text, _counts(answer.text, row, types, seen))
            for row, answer in zip(rows, answers(view, progress), strict=True)
        ]

    once = shared(judge)

    def runner(pool: str) -> Callable[[Any, Progress], list[Item]]:
        return lambda view, progress: [_item(r, *found, pool) for r, found in zip(rows, once(view, progress))]

    return [
        Eval(
            eval_id if len(by) == 1 else f"{eval_id}/{pool}",
            f"span_{pool}",
            len(rows),
            runner(pool),
            role=role,
            pool=pool,
            hparams=hparams,
        )
        for pool in by
    ]


def _counts(answer: str, row: dict[str, Any], types: Sequence[str], seen: set[str]) -> list[float]:
    said = read_answer(answer, row["tokens"], seen)
    wanted = [span for span in spans_of(row["tags"]) if span.type in seen]
    return counts(said, wanted, types)


def _item(row: dict[str, Any], answer: str, found: list[float], pool: str) -> Item:
    parts = found if pool == "f1_macro" else np.reshape(found, (-1, 3)).sum(axis=0).tolist()
    return {"id": row["id"], "prediction": answer.strip(), "score": pooled([{"parts": parts}], pool), "parts": parts}
