"""What edits did: reliability, generality, locality. Card metrics/editing-metrics.

A score compares a model's tokens with wanted ones, the answer's (reliability, generality) or those of the model before
the edits (locality), in one of three readings:

- ``token``: prompt and answer are given, the share of the answer's tokens that are the most likely ones (EasyEdit). A
  wrong start costs one token here, since the right one is shown before the next is asked for.
- ``exact``: the prompt is given, the model writes greedily as many tokens as the answer has, all must be the wanted
  ones. That number is thereby revealed; no end mark is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Clock, Model, Params
from jaxcl.core.view import View
from jaxcl.data.editing import Asked
from jaxcl.data.encode import encode
from jaxcl.data.pipeline import stack
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.answers import Answers, How
from jaxcl.evaluate.base import Eval, Item, Progress, bucket, check_items, grouped
from jaxcl.models.generate import generate

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

READINGS = ("token", "exact", "free")
ROOM = 8
"""Tokens by which a free answer may be longer than the longest wanted one before it is cut off, and wrong."""


Said = list[str] | list[list[int]]
"""What was answered to every prompt."""


def correct(
    eval_id: str, asked: Sequence[Asked], tokenizer: Tokenizer, *, by: str, batch_size: int = 16, role: str = "task"
) -> Eval:
    """Answers against the wanted ones: reliability on the edits' prompts, generality on their rephrasings.

    RequestError: nothing to ask, an unknown reading, an empty answer.
    """
    answers = _Answers(eval_id, asked, tokenizer, by, batch_size)

    def run(view: View, progress: Progress) -> list[Item]:
        return answers.items(answers.said(view, progress), answers.wanted)

    return Eval(eval_id, f"{by}_match", len(asked), run, role=role)


def unchanged(
    eval_id: str,
    asked: Sequence[Asked],
    tokenizer: Tokenizer,
    model: Model,
    params: Params,
    *,
    by: str,
    batch_size: int = 16,
    role: str = "general",
) -> Eval:
    """Answers against those of ``params``, the model before any edit: locality. RequestError as for `correct`."""
    answers = _Answers(eval_id, asked, tokenizer, by, batch_size)
    before = View(model).at(model.spec, params, {}, {}, Clock.at())

    @functools.cache
    def old() -> Said:
        return answers.said(before, lambda done, total: None)

    def run(view: View, progress: Progress) -> list[Item]:
        return answers.items(answers.said(view, progress), old())

    return Eval(eval_id, f"{by}_match_before", len(asked), run, role=role)


def answer_nll(
    eval_id: str, asked: Sequence[Asked], tokenizer: Tokenizer, *, batch_size: int = 16, role: str = "general"
) -> Eval:
    """Nats per token of the given answers: what else the model knows, and whether it still does."""
    answers = _Answers(eval_id, asked, tokenizer, "token", batch_size)

    def run(view: View, progress: Progress) -> list[Item]:
        nll = answers.each(view, progress, mean_nll)
        return [{"id": a.id, "prediction": None, "score": float(x)} for a, x in zip(asked, nll)]

    return Eval(eval_id, "nll", len(asked), run, higher_is_better=False, range=(0.0, np.inf), role=role)


def mean_nll(apply: Any, head: Any, spec: Any, params: Params, batch: Batch) -> jax.Array:
    """f32[B]: mean nll of each row's targets."""
    weight = batch["weight"]
    return jnp.sum(weight * apply(spec, params, batch).nll, axis=1) / jnp.sum(weight, axis=1)


def most_likely(apply: Any, head: Any, spec: Any, params: Params, batch: Batch) -> jax.Array:
    """i32[B,K]: the most likely token at each target's place, given the true ones before it."""
    hidden = apply(spec, params, batch).hidden
    return jnp.argmax(head(spec, params, hidden, jnp.maximum(batch["targets_at"] - 1, 0)), axis=-1)


class _Answers:
    """Prompts and answers as ids, encoded once, and what a model makes of them."""

    def __init__(self, eval_id: str, asked: Sequence[Asked], tokenizer: Tokenizer, by: str, batch_size: int):
        check_items(eval_id, [a._asdict() for a in asked], batch_size)
        if by not in READINGS:
            raise unknown("reading of an edit's score", by, READINGS)
        for a in asked:
            if not a.answer or not a.prompt:
                raise RequestError(f"eval {eval_id!r}: {a.id!r} has an empty prompt or answer")
        self.asked, self.tokenizer, self.by, self.batch_size = list(asked), tokenizer, by, batch_size

    @functools.cached_property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        return [a.ids(self.tokenizer) for a in self.asked]

    @property
    def wanted(self) -> Said:
        return [a.answer.strip() for a in self.asked] if self.by == "free" else self.targets

    @property
    def targets(self) -> list[list[int]]:
        return [answer for _, answer in self.pairs]

    @functools.cached_property
    def longest(self) -> int:
        return max(map(len, self.targets))

    @functools.cached_property
    def free(self) -> Answers:
        how = How(self.longest + ROOM, stop=("\n",))
        prompts = [prompt for prompt, _ in self.pairs]
        most = max(map(len, prompts))
        return Answers(lambda: prompts, self.tokenizer, how, most=most, batch_size=self.batch_size)

    def said(self, view: View, progress: Progress) -> Said:
        """What the model answers: whole texts (free), or as many tokens as each wanted answer has."""
        if self.by == "free":
            return [answer.text.strip() for answer in self.free(view, progress)]
        found = self.each(view, progress, most_likely) if self.by == "token" else self.written(view, progress)
        return [row[: len(answer)].tolist() for row, answer in zip(found, self.targets)]

    def each(self, view: View, progress: Progress, fn: Callable[..., jax.Array]) -> list[np.ndarray]:
        """``fn`` of every prompt with its answer, in batches of few shapes."""

        def row(i: int, size: int) -> dict[str, Any]:
            prompt, answer = self.pairs[i]
            return encode(np.array(prompt, np.int32), answer, size, self.longest, pad=self.tokenizer.pad_id, row=i)

        sizes = [len(prompt) + len(answer) for prompt, answer in self.pairs]
        return self._batches(sizes, progress, lambda rows: view.call(fn, stack(rows)), row)

    def written(self, view: View, progress: Progress) -> list[np.ndarray]:
        """Greedy continuations of every prompt."""
        write = _writer(self.longest, self.tokenizer.pad_id)

        def row(i: int, size: int) -> tuple[np.ndarray, np.ndarray]:
            prompt = self.pairs[i][0]
            return np.pad(np.array(prompt, np.int32), (0, size - len(prompt))), np.array(len(prompt), np.int32)

        def call(rows: Sequence[Any]) -> jax.Array:
            tokens, lengths = zip(*rows)
            return view.call(write, np.stack(tokens), np.stack(lengths))[0]

        return self._batches([len(prompt) for prompt, _ in self.pairs], progress, call, row)

    def _batches(self, sizes: list[int], progress: Progress, call: Callable, row: Callable) -> list[np.ndarray]:
        """Results in the rows' order; a batch that is short repeats its first row."""
        found: list[np.ndarray] = [np.zeros(0)] * len(sizes)
        done = 0
        for size, members in grouped([bucket(n, max(sizes)) for n in sizes], self.batch_size):
            rows = [row(i, size) for i in members]
            result = host(call(rows + [rows[0]] * (self.batch_size - len(rows))))
            for i, one in zip(members, result):
                found[i] = one
            done += len(members)
            progress(done, len(sizes))
        return found

    def items(self, found: Said, wanted: Said) -> list[Item]:
        shown = [f if isinstance(f, str) else self.tokenizer.decode(f) for f in found]
        scores = [float(_SCORES[self.by](f, w)) for f, w in zip(found, wanted)]
        return [{"id": a.id, "prediction": text, "score": x} for a, text, x in zip(self.asked, shown, scores)]


_SCORES: dict[str, Callable[[Any, Any], Any]] = {
    "token": lambda found, wanted: np.mean(np.equal(found, wanted)),
    "exact": lambda found, wanted: found == wanted,
    "free": lambda found, wanted: found == wanted,
}


@functools.cache
def _writer(max_new: int, pad: int) -> Callable[..., Any]:
    """One object per setting, because it is the key under which a view keeps what it compiled."""
    return functools.partial(generate, max_new=max_new, stop_ids=(), pad=pad)
