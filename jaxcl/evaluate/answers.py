"""What a model writes after prompts: greedy or sampled, in batches of few shapes, cut where an answer ends.

An answer ends with the end-of-sequence token, with a stop string, or after ``max_new`` tokens. A stop string that is
one token ends its row at once. Others are looked for in the decoded text every `BLOCK` tokens, so a row may write on
for that long before its text is cut at the string; in the end every text is cut at the first stop string in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxcl.core.processes import host
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Progress, bucket, filled, grouped
from jaxcl.models.generate import Writing, Written

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

BLOCK = 32
"""Tokens that are written between two looks for stop strings."""


class How(NamedTuple):
    """How answers are written. stop: strings that end one. temperature 0: greedy; above it, sampled from the smallest
    set of tokens whose probability reaches ``top_p``, row i of an eval with the key of (seed, i)."""

    max_new: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self, where: str, window: int) -> How:
        """Itself. RequestError where no answer or no prompt fits the window, or a setting makes no sense."""
        if not 0 < self.max_new < window:
            raise RequestError(f"{where}: answers of {self.max_new} tokens; accepted: 1 to {window - 1} (window)")
        if not self.temperature >= 0:
            raise RequestError(f"{where}: temperature={self.temperature}; accepted: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"{where}: top_p={self.top_p}; accepted: above 0, up to 1")
        if not 0 <= self.seed < 2**31:
            raise RequestError(f"{where}: seed={self.seed}; accepted: 0 to {2**31 - 1}")
        if not all(self.stop):
            raise RequestError(f"{where}: an empty stop string; accepted: texts that end an answer")
        return self

    def hparams(self) -> dict[str, Any]:
        """As JSON, what does not matter left out."""
        sampled = {"top_p": self.top_p, "seed": self.seed} if self.temperature else {}
        stop = {"stop": list(self.stop)} if self.stop else {}
        return {"max_new": self.max_new, **stop, "temperature": self.temperature, **sampled}


class Answer(NamedTuple):
    """text: up to the first stop string. ids: all that was written, but for the single token that ended it."""

    text: str
    ids: list[int]


class Answers:
    """(view, progress) -> one `Answer` a prompt, in their order. prompts: called at the first run, and kept.

    most: tokens of the longest prompt that may come.
    """

    def __init__(
        self,
        prompts: Callable[[], Sequence[Sequence[int]]],
        tokenizer: Tokenizer,
        how: How,
        *,
        most: int,
        batch_size: int,
    ):
        self.read, self.tokenizer, self.how, self.most, self.batch_size = prompts, tokenizer, how, most, batch_size
        single = [ids[0] for ids in map(tokenizer.encode, how.stop) if len(ids) == 1]
        self.first, self.more = _writers(how._replace(seed=0), (tokenizer.eos_id, *single), tokenizer.pad_id)

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        return [list(ids) for ids in self.read()]

    def __call__(self, view: Any, progress: Progress) -> list[Answer]:
        found: list[Answer] = [Answer("", [])] * len(self.prompts)
        done = 0
        for size, members in grouped([bucket(len(p), self.most) for p in self.prompts], self.batch_size):
            for i, answer in zip(members, self._batch(view, size, members)):
                found[i] = answer
            done += len(members)
            progress(done, len(found))
        return found

    def _batch(self, view: Any, size: int, members: Sequence[int]) -> list[Answer]:
        prompts = [np.array(self.prompts[i], np.int32) for i in members]
        columns = (
            [np.pad(prompt, (0, size - len(prompt))) for prompt in prompts],
            [np.array(len(prompt), np.int32) for prompt in prompts],
            [np.array([self.how.seed, i], np.int32) for i in members],
        )
        rows = tuple(filled(column, self.batch_size) for column in columns)
        state = view.call(self.first, *rows)
        while True:
            made, done = int(state.made), host(state.done)
            answers = [self._answer(ids[:n]) for ids, n in zip(host(state.tokens), host(state.lengths))]
            ended = done | [len(a.text) < len(self.tokenizer.decode(a.ids)) for a in answers]
            if made >= self.how.max_new or ended.all():
                return answers[: len(members)]
            state = view.call(self.more, *rows, state, ended)

    def _answer(self, ids: np.ndarray) -> Answer:
        text = self.tokenizer.decode(ids.tolist())
        return Answer(cut(text, self.how.stop), ids.tolist())


def cut(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


@functools.cache
def _writers(how: How, stop_ids: tuple[int, ...], pad: int) -> tuple[Callable[..., Written], Callable[..., Written]]:
    """(start, continue) of a batch; one pair per setting, for they are keys under which a view keeps what it compiled.

    Without stop strings the first call writes all.
    """
    fixed: dict[str, Any] = {"max_new": how.max_new, "stop_ids": stop_ids, "pad": pad}
    fixed |= {"temperature": how.temperature, "top_p": how.top_p}

    def writing(apply: Any, head: Any, spec: Any, params: Any, prompts: Any, lengths: Any, seeds: jax.Array) -> Writing:
        key = jax.vmap(lambda of: jax.random.fold_in(jax.random.key(of[0]), of[1]))(seeds) if how.temperature else None
        return Writing(apply, head, spec, params, prompts, lengths, key=key, **fixed)

    def first(apply: Any, head: Any, spec: Any, params: Any, *rows: Any) -> Written:
        batch = writing(apply, head, spec, params, *rows)
        return batch.on(batch.start(), BLOCK if how.stop else how.max_new)

    def more(apply: Any, head: Any, spec: Any, params: Any, *given: Any) -> Written:
        *rows, state, ended = given
        batch = writing(apply, head, spec, params, *rows)
        return batch.on(state._replace(done=state.done | ended), state.made + BLOCK)

    return first, more
