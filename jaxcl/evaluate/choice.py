"""Multiple choice by likelihood, item for item as EleutherAI's lm-evaluation-harness scores it (Gao et al. 2021).

A choice is joined to its context by a space (``delimiter``). Context and whole are encoded; what the whole has after as
many tokens as the context has is scored, so the boundary may fall inside a merged token just as it does there. White
space at the context's end goes to the choice. A context that is too long
loses its beginning, for each choice by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import begun
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, check_items, shared
from jaxcl.evaluate.endings import endings_nll
from jaxcl.evaluate.nll import start_id

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]
Scores = tuple[np.ndarray, np.ndarray]
"""Log-likelihoods f64[L] of a row's choices after the context, and without any (empty where not asked for)."""


def lengths(choices: Sequence[str]) -> np.ndarray:
    return np.array([len(choice) for choice in choices], np.float64)


def byte_lengths(choices: Sequence[str]) -> np.ndarray:
    return np.array([len(choice.encode()) for choice in choices], np.float64)


RULES: dict[str, Callable[[Scores, Sequence[str]], np.ndarray]] = {
    "acc": lambda scores, choices: scores[0],
    "acc_norm": lambda scores, choices: scores[0] / lengths(choices),
    "acc_bytes": lambda scores, choices: scores[0] / byte_lengths(choices),
    "acc_mutual_info": lambda scores, choices: scores[0] - scores[1],
}
"""What is compared: the log-likelihood; over the choice's characters; over its UTF-8 bytes; less that of the choice
without a context. The highest wins, the first of equal ones."""


def multiple_choice(
    eval_id: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    window: int,
    by: Sequence[str] = ("acc", "acc_norm"),
    batch_size: int = 16,
    delimiter: str = " ",
    role: str = "task",
) -> list[Eval]:
    """One eval per name of `RULES` in ``by``, all from one pass over rows {id, context, choices, answer (an index)}.

    Ids: ``eval_id`` where there is one, else ``eval_id/name``. window: tokens that the model reads at a time (the last
    one of a choice is not read), the harness's ``max_length``. RequestError: no rows, an unknown name, a row with fewer
    than two choices, an answer that is no index of them, an empty choice; when it runs: a choice beyond the window.
    """
    check_items(eval_id, rows, batch_size)
    for name in by:
        if name not in RULES:
            raise unknown("measure of multiple choice", name, RULES)
    for row in rows:
        check_row(eval_id, row)
    once = shared(_Choices(eval_id, rows, tokenizer, window, batch_size, delimiter, "acc_mutual_info" in by))
    chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    return [
        Eval(
            eval_id if len(by) == 1 else f"{eval_id}/{name}",
            name,
            len(rows),
            functools.partial(_items, once, rows, name),
            role=role,
            chance=chance,
        )
        for name in by
    ]


def check_row(eval_id: str, row: Row) -> None:
    """RequestError where the row is no question with an answer."""
    where, choices, answer = f"eval {eval_id!r}: row {row['id']!r}", row["choices"], row["answer"]
    if len(choices) < 2 or not all(choices):
        raise RequestError(f"{where} has the choices {choices!r}; accepted: two or more, none of them empty")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise RequestError(f"{where} has the answer {answer!r}; accepted: 0 to {len(choices) - 1}, a choice's index")


def _items(
    once: Callable[[Any, Progress], list[Scores]], rows: Sequence[Row], rule: str, view: Any, progress: Progress
) -> list[Item]:
    return [item(row, scores, rule) for row, scores in zip(rows, once(view, progress))]


def item(row: Row, scores: Scores, rule: str) -> Item:
    best = int(np.argmax(RULES[rule](scores, row["choices"])))
    return {"id": row["id"], "prediction": row["choices"][best], "score": float(best == row["answer"])}


def pair(context: str, choice: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the context, and of what follows them in the encoding of both together."""
    kept = context.rstrip()
    choice = context[len(kept) :] + choice
    if not kept:
        first, ids = start_id(tokenizer), tokenizer.encode(choice)
        return ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
    before = begun(tokenizer, kept)
    return before, begun(tokenizer, kept + choice)[len(before) :]


class _Choices:
    """The pass over all rows; what is asked is encoded at the first run and kept."""

    def __init__(
        self,
        eval_id: str,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        window: int,
        batch_size: int,
        delimiter: str,
        alone: bool,
    ):
        self.id, self.rows, self.tokenizer, self.window = eval_id, list(rows), tokenizer, window
        self.batch_size, self.delimiter, self.alone = batch_size, delimiter, alone

    @functools.cached_property
    def asked(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """(prompt, ending) of each choice of each row; then those without a context, where they are asked for."""
        contexts = [[row["context"] for row in self.rows], [""] * len(self.rows)]
        return [
            [self._pair(row, context, choice) for choice in row["choices"]]
            for texts in contexts[: 1 + self.alone]
            for row, context in zip(self.rows, texts)
        ]

    def _pair(self, row: Row, context: str, choice: str) -> tuple[np.ndarray, np.ndarray]:
        before, after = pair(context, self.delimiter + choice, self.tokenizer)
        if not 0 < len(after) <= self.window:
            raise RequestError(
                f"eval {self.id!r}: row {row['id']!r} has a choice of {len(after)} tokens; accepted: 1 to "
                f"{self.window} (window)"
            )
        room = self.window + 1 - len(after)
        return np.array(before[-room:], np.int32), np.array(after, np.int32)

    def __call__(self, view: Any, progress: Progress) -> list[Scores]:
        prompts: list[np.ndarray] = []
        endings: list[list[np.ndarray]] = []
        places: list[list[tuple[int, int]]] = []
        for pairs in self.asked:
            known: dict[bytes, int] = {}  # the choices of a row share a prompt unless one of them cut it
            places.append([])
            for before, after in pairs:
                at = known.setdefault(before.tobytes(), len(prompts))
                if at == len(prompts):
                    prompts.append(before)
                    endings.append([])
                places[-1].append((at, len(endings[at])))
                endings[at].append(after)
        found = endings_nll(view, prompts, endings, self.batch_size, counter(progress, len(prompts), len(self.rows)))
        scores = [np.array([-float(found[at][0, n]) for at, n in each]) for each in places]
        count = len(self.rows)
        return [(one, scores[count + i] if self.alone else np.zeros(0)) for i, one in enumerate(scores[:count])]


def counter(progress: Progress, prompts: int, rows: int) -> Progress:
    """Progress in rows where several prompts, or fewer, make a row."""
    return lambda done, total: progress(done * rows // prompts, rows)
