"""Written answers: one pass of generation over the rows, and as many text metrics of it as are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import check_frames, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import unknown
from jaxcl.evaluate.answers import Answer, Answers, How
from jaxcl.evaluate.base import Eval, Item, Progress, accepted, check_items, shared
from jaxcl.metrics.pooling import pooled
from jaxcl.metrics.text import TEXT_METRICS, TextMetric

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

RULES = ("strict", "lenient")


def generation(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    metrics: Sequence[str] = ("exact_match_strict",),
    template: Template | None = None,
    max_new: int | None = None,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    role: str = "task",
) -> list[Eval]:
    """One eval for each of ``metrics`` (names of `jaxcl.metrics.text.TEXT_METRICS`) over what the model writes for
    ``instruct`` rows; ids: ``eval_id``, or ``eval_id/metric`` where there are several.

    max_new: tokens that may be written (default: the longest answer that counts, with its end mark). Prompts are cut as
    in training, to ``window`` - max_new tokens. stop, temperature, top_p, seed: see `jaxcl.evaluate.answers.How`; with
    them the eval says how it was asked in ``hparams``. RequestError: no rows, an unknown metric, no room for a prompt.
    """
    chosen = [_metric(name) for name in metrics]
    answers = written(
        eval_id, rows, tokenizer, window=window, template=template, max_new=max_new, stop=stop,
        temperature=temperature, top_p=top_p, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    once = shared(answers)
    return [
        Eval(
            eval_id if len(chosen) == 1 else f"{eval_id}/{m.name}",
            m.name,
            len(rows),
            _scored(once, rows, functools.partial(text_item, m)),
            higher_is_better=m.higher_is_better,
            range=m.range,
            role=role,
            pool=m.pool,
            hparams=answers.how.hparams(),
        )
        for m in chosen
    ]


def exact_match(
    eval_id: str, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, rule: str = "strict", **how: Any
) -> Eval:
    """Share of rows whose written answer equals ``target`` (or one of ``targets``) under ``rule``: 'strict' or
    'lenient'. The other arguments and errors are those of `generation`."""
    if rule not in RULES:
        raise unknown("rule of exact match", rule, RULES)
    return generation(eval_id, rows, tokenizer, metrics=(f"exact_match_{rule}",), **how)[0]


def written(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    max_new: int | None = None,
    batch_size: int = 16,
    **how: Any,
) -> Answers:
    """What a model writes for ``instruct`` rows; the arguments and errors are those of `generation`."""
    check_items(eval_id, rows, batch_size)
    template = template or Template()
    if max_new is None:
        texts = {answer for row in rows for answer in accepted(row)}
        max_new = max(len(target_ids({"target": text}, template, tokenizer)) for text in texts)
    stop = tuple(how.pop("stop", ()))
    setting = How(max_new, stop, **how).check(f"eval {eval_id!r}", window)
    room = window - max_new
    check_frames(rows, [room] * len(rows), template, tokenizer)
    prompts = functools.partial(_prompts, list(rows), template, tokenizer, room)
    return Answers(prompts, tokenizer, setting, most=room, batch_size=batch_size)


def text_item(metric: TextMetric, row: dict[str, Any], text: str) -> Item:
    """A row's item by a text metric; where it is pooled, ``score`` is the pool of the row's own parts alone."""
    needed = {"source": row["input"]} if "source" in metric.needs else {}
    value = metric.of(text, accepted(row), **needed)
    if metric.pool is None:
        return {"id": row["id"], "prediction": text.strip(), "score": float(value)}
    parts = {"parts": np.asarray(value, np.float64).tolist()}
    return {"id": row["id"], "prediction": text.strip(), "score": pooled([parts], metric.pool), **parts}


def _scored(
    once: Callable[[Any, Progress], list[Answer]], rows: Sequence[dict[str, Any]], item: Callable[..., Item]
) -> Callable[[Any, Progress], list[Item]]:
    def run(view: Any, progress: Progress) -> list[Item]:
        return [item(row, answer.text) for row, answer in zip(rows, once(view, progress), strict=True)]

    return run


def _prompts(rows: Sequence[dict[str, Any]], template: Template, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    return [fit_prompt(row, template, tokenizer, room) for row in rows]


def _metric(name: str) -> TextMetric:
    if name not in TEXT_METRICS:
        raise unknown("text metric", name, TEXT_METRICS)
    return TEXT_METRICS[name]
