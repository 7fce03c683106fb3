"""Greedy exact match: the model writes its answer, and the answer is right or it is not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import check_frames, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, accepted, bucket, check_items, filled, grouped
from jaxcl.metrics.overlap import lenient, strict
from jaxcl.models.generate import generate

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


RULES: dict[str, Callable[[str], str]] = {"strict": strict, "lenient": lenient}


def exact_match(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    batch_size: int = 16,
    max_new: int | None = None,
    rule: str = "strict",
    role: str = "task",
) -> Eval:
    """Share of rows whose greedy continuation equals ``target`` (or one of ``targets``) under ``rule``.

    max_new: tokens that may be written (default: the longest target with its end mark). Generation stops at
    the end-of-sequence token. Prompts are shortened to ``window`` - max_new tokens as in training.
    RequestError: no rows, an unknown rule, no room for a prompt.
    """
    check_items(eval_id, rows, batch_size)
    if rule not in RULES:
        raise unknown("rule of exact match", rule, RULES)
    template = template or Template()
    if max_new is None:
        answers = {answer for row in rows for answer in accepted(row)}
        max_new = max(len(target_ids({"target": answer}, template, tokenizer)) for answer in answers)
    if not 0 < max_new < window:
        raise RequestError(
            f"eval {eval_id!r}: answers of {max_new} tokens; accepted: 1 to {window - 1} (window)"
        )
    run = _ExactMatch(rows, tokenizer, template, window, batch_size, max_new, RULES[rule])
    return Eval(eval_id, f"exact_match_{rule}", len(rows), run, role=role)


class _ExactMatch:
    """The evaluator: prompts are encoded at the first run and kept."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        template: Template,
        window: int,
        batch_size: int,
        max_new: int,
        rule: Callable[[str], str],
    ) -> None:
        self.rows, self.tokenizer, self.template, self.rule = list(rows), tokenizer, template, rule
        self.room, self.batch_size = window - max_new, batch_size
        check_frames(rows, [self.room] * len(rows), template, tokenizer)
        self.prompts: list[list[int]] = []
        self.write = _writer(max_new, tokenizer.eos_id, tokenizer.pad_id)

    def __call__(self, view: Any, progress: Progress) -> list[Item]:
        if not self.prompts:
            self.prompts = [fit_prompt(r, self.template, self.tokenizer, self.room) for r in self.rows]
        items: list[Item] = [{}] * len(self.rows)
        done = 0
        for size, members in grouped([bucket(len(p), self.room) for p in self.prompts], self.batch_size):
            prompts = [np.array(self.prompts[i], np.int32) for i in members]
            tokens = [np.pad(prompt, (0, size - len(prompt))) for prompt in prompts]
            lengths = [np.array(len(prompt), np.int32) for prompt in prompts]
            written, count = view.call(
                self.write, filled(tokens, self.batch_size), filled(lengths, self.batch_size)
            )
            for i, ids, n in zip(members, np.asarray(written), np.asarray(count)):
                items[i] = self._item(i, self.tokenizer.decode(ids[:n].tolist()))
            done += len(members)
            progress(done, len(self.rows))
        return items

    def _item(self, i: int, text: str) -> Item:
        row = self.rows[i]
        right = self.rule(text) in {self.rule(answer) for answer in accepted(row)}
        return {"id": row["id"], "prediction": text.strip(), "score": float(right)}


@functools.cache
def _writer(max_new: int, eos: int, pad: int) -> Callable[..., Any]:
    """One object per setting, because it is the key under which a view keeps what it compiled."""
    return functools.partial(generate, max_new=max_new, stop_ids=(eos,), pad=pad)
