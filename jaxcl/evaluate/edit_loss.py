"""What a model's loss says of edits: perplexity, generality far from the prompt, old answer against new one.

Card metrics/editing-metrics. All three read `jaxcl.evaluate.editing.answer_nll`, nats per token of a given answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.data.editing import Asked
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Eval, Item, Progress
from jaxcl.evaluate.editing import answer_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

LIKELY = -math.log(0.8)
"""Nats per token below which an answer counts as known (WISE, temporal edits)."""


def answer_perplexity(
    eval_id: str, asked: Sequence[Asked], tokenizer: Tokenizer, *, batch_size: int = 16, role: str = "task"
) -> Eval:
    """Perplexity of the given answers, all tokens weighing the same: exp(sum of nats / tokens). RequestError: nothing
    to ask, an empty answer. Source: GRACE (arXiv 2211.11031) and WISE (arXiv 2405.14768), hallucination."""
    nll = answer_nll(eval_id, asked, tokenizer, batch_size=batch_size, role=role)
    tokens = {a.id: len(a.ids(tokenizer)[1]) for a in asked}

    def run(view: Any, progress: Progress) -> list[Item]:
        return [
            item | {"score": math.exp(min(item["score"], 700.0)), "parts": [item["score"] * n, float(n)]}
            for item in nll.run(view, progress)
            for n in [tokens[item["id"]]]
        ]

    return dataclasses.replace(nll, metric="perplexity", run=run, range=(1.0, math.inf), pool="exp_ratio")


def answer_likely(
    eval_id: str,
    asked: Sequence[Asked],
    tokenizer: Tokenizer,
    *,
    below: float = LIKELY,
    batch_size: int = 16,
    role: str = "probe",
) -> Eval:
    """Share of the given answers whose nats per token are less than ``below``: WISE's generality out of distribution,
    1[loss < -log 0.8]. RequestError as in `answer_perplexity`."""
    nll = answer_nll(eval_id, asked, tokenizer, batch_size=batch_size, role=role)

    def run(view: Any, progress: Progress) -> list[Item]:
        return [item | {"score": float(item["score"] < below)} for item in nll.run(view, progress)]

    return dataclasses.replace(nll, metric="likely_answer", higher_is_better=True, range=(0.0, 1.0), run=run)


def answer_preferred(
    eval_id: str,
    wanted: Sequence[Asked],
    other: Sequence[Asked],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 16,
    role: str = "task",
) -> Eval:
    """Share of prompts whose wanted answer is more likely per token than the other one: CounterFact's success (the new
    answer against the old one; on neighbours the other way round; ROME, arXiv 2202.05262). The prediction says which.

    RequestError: answers to other prompts, or as in `answer_perplexity`.
    """
    if [(a.id, a.prompt) for a in wanted] != [(a.id, a.prompt) for a in other]:
        raise RequestError(f"eval {eval_id!r}: the two answers are not to the same prompts; accepted: a pair a prompt")
    one, two = (answer_nll(eval_id, asked, tokenizer, batch_size=batch_size, role=role) for asked in (wanted, other))

    def run(view: Any, progress: Progress) -> list[Item]:
        pairs = zip(wanted, other, one.run(view, progress), two.run(view, progress))
        return [
            {"id": a.id, "prediction": a.answer if better else b.answer, "score": float(better)}
            for a, b, x, y in pairs
            for better in [x["score"] < y["score"]]
        ]

    return dataclasses.replace(one, metric="answer_preferred", higher_is_better=True, range=(0.0, 1.0), run=run)
