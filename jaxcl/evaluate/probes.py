"""Probes of what a model knows: is the object of a relation what it says, and where among all candidates does it rank.

After LAMA (Petroni et al. 2019) and ParaRel (Elazar et al. 2021): a prompt such as ``The capital of France is`` is
continued by the candidates, which are all objects of its relation, or the row's own choices.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcl.data.encode import begun
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, check_items, shared
from jaxcl.evaluate.choice import counter
from jaxcl.evaluate.endings import endings_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]


class Answered(NamedTuple):
    """One wording of a probe. best: the likeliest candidate, None where none was asked for. rank: of the best right one
    among the wrong ones, from 1. said: whether greedy decoding of the prompt begins with a right answer."""

    best: str | None
    rank: int
    said: bool


def exact_match(wordings: Sequence[Answered], right: Sequence[str]) -> float:
    """Whether the greedy continuation begins with one of the answers, token for token."""
    return float(wordings[0].said)


def hits_at_1(wordings: Sequence[Answered], right: Sequence[str]) -> float:
    """Whether no wrong candidate is as likely as the likeliest right one."""
    return float(wordings[0].rank == 1)


def reciprocal_rank(wordings: Sequence[Answered], right: Sequence[str]) -> float:
    """1 / rank of the likeliest right candidate among the wrong ones."""
    return 1 / wordings[0].rank


def consistency(wordings: Sequence[Answered], right: Sequence[str]) -> float:
    """Share of pairs of wordings with the same likeliest candidate (Elazar et al. 2021, section 3)."""
    pairs = list(itertools.combinations([w.best for w in wordings], 2))
    return sum(a == b for a, b in pairs) / len(pairs)


def consistent_accuracy(wordings: Sequence[Answered], right: Sequence[str]) -> float:
    """Whether the likeliest candidate is right under every wording."""
    return float(all(w.best in right for w in wordings))


METRICS: dict[str, Callable[[Sequence[Answered], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "hits@1": hits_at_1,
    "mrr": reciprocal_rank,
    "consistency": consistency,
    "consistent_accuracy": consistent_accuracy,
}
WORDINGS = ("consistency", "consistent_accuracy")
"""Metrics over all wordings of a probe; they leave out rows that have a single one."""


def probes(
    eval_id: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    window: int,
    metrics: Sequence[str] = ("exact_match", "hits@1", "mrr"),
    candidates: Mapping[str, Sequence[str]] | None = None,
    frame: str = "{prompt}",
    normalise: str = "sum",
    batch_size: int = 16,
    role: str = "probe",
) -> list[Eval]:
    """One eval per name of `METRICS` over ``probe`` rows, ids ``eval_id/name`` (``eval_id`` where there is one).

    Candidates: the row's ``choices``, else ``candidates[relation]``, else every answer of the relation's rows (of
    `objects`); subsampled rows should be given the objects of all. normalise: a candidate's log-probability, 'sum', or
    over its tokens, 'mean'. frame: the text around a prompt, such as ``Q: {prompt}\\nA:``. A row's ``answers`` do not
    compete: rank counts the wrong candidates that are at least as likely. RequestError: no rows (with several wordings
    where a metric needs them), an unknown name, a row whose answers are no candidates; when it runs: a candidate that
    does not fit.
    """
    check_items(eval_id, rows, batch_size)
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric of probes", name, METRICS)
    if normalise not in ("sum", "mean"):
        raise unknown("normalisation", normalise, ("sum", "mean"))
    if "{prompt}" not in frame:
        raise RequestError(f"eval {eval_id!r}: frame {frame!r}; accepted: a text that holds {{prompt}}")
    known = candidates or objects(rows)
    ranked = set(metrics) != {"exact_match"}
    asked = [_candidates(eval_id, row, known) if ranked else [] for row in rows]
    several = [i for i, row in enumerate(rows) if row.get("paraphrases")]
    if set(WORDINGS) & set(metrics) and not several:
        raise RequestError(f"eval {eval_id!r}: no row has paraphrases; accepted: metrics without consistency")
    wordings = bool(set(WORDINGS) & set(metrics))
    once = shared(_Probes(eval_id, rows, asked, tokenizer, window, frame, normalise == "mean", batch_size, wordings))
    made = []
    for name in metrics:
        here = several if name in WORDINGS else list(range(len(rows)))
        right = [len(set(asked[i]) & set(rows[i]["answers"])) / max(len(asked[i]), 1) for i in here]
        made.append(
            Eval(
                eval_id if len(metrics) == 1 else f"{eval_id}/{name}",
                name,
                len(here),
                functools.partial(_items, once, rows, here, name),
                role=role,
                chance=math.fsum(right) / len(here) if name == "hits@1" else None,
            )
        )
    return made


def objects(rows: Sequence[Row]) -> dict[str, list[str]]:
    """{relation: its answers in the order in which they first occur}."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row["relation"], {}).update(dict.fromkeys(row["answers"]))
    return {relation: list(answers) for relation, answers in found.items()}


def _candidates(eval_id: str, row: Row, known: Mapping[str, Sequence[str]]) -> list[str]:
    found = list(dict.fromkeys(c for c in row.get("choices") or known.get(row["relation"], ()) if c))
    if not set(found) & set(row["answers"]):
        raise RequestError(
            f"eval {eval_id!r}: row {row['id']!r} has the answers {row['answers']!r}, none of them among the "
            f"{len(found)} candidates of {row['relation']!r}"
        )
    return found


def _items(
    once: Callable[[Any, Progress], list[list[Answered]]],
    rows: Sequence[Row],
    here: Sequence[int],
    name: str,
    view: Any,
    progress: Progress,
) -> list[Item]:
    answered = once(view, progress)
    return [
        {
            "id": rows[i]["id"],
            "prediction": answered[i][0].best,
            "score": METRICS[name](answered[i], rows[i]["answers"]),
        }
        for i in here
    ]


class _Probes:
    """The pass over all rows, and over their other wordings where a metric needs them."""

    def __init__(
        self,
        eval_id: str,
        rows: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        tokenizer: Tokenizer,
        window: int,
        frame: str,
        mean: bool,
        batch_size: int,
        wordings: bool,
    ) -> None:
        self.id, self.rows, self.candidates, self.tokenizer = eval_id, list(rows), candidates, tokenizer
        self.window, self.frame, self.mean, self.batch_size, self.wordings = window, frame, mean, batch_size, wordings
        self.ids: dict[str, list[int]] = {}

    def _ending(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer.encode(" " + text)
        return self.ids[text]

    @functools.cached_property
    def prompts(self) -> list[tuple[int, np.ndarray]]:
        """(row, ids) of every wording, a row's own prompt before its paraphrases."""
        found = []
        for i, row in enumerate(self.rows):
            longest = max(len(self._ending(c)) for c in (*self.candidates[i], *row["answers"]))
            for text in (row["prompt"], *(row.get("paraphrases") or ())[: None if self.wordings else 0]):
                ids = begun(self.tokenizer, self.frame.replace("{prompt}", text))
                if len(ids) + longest > self.window:
                    raise RequestError(
                        f"eval {self.id!r}: row {row['id']!r} needs {len(ids) + longest} tokens with its longest "
                        f"candidate; accepted: up to {self.window} (window)"
                    )
                found.append((i, np.array(ids, np.int32)))
        return found

    def __call__(self, view: Any, progress: Progress) -> list[list[Answered]]:
        texts = [list(dict.fromkeys((*c, *row["answers"]))) for c, row in zip(self.candidates, self.rows)]
        endings = [[self._ending(text) for text in each] for each in texts]
        count = counter(progress, len(self.prompts), len(self.rows))
        prompts = [ids for _, ids in self.prompts]
        found = endings_nll(view, prompts, [endings[i] for i, _ in self.prompts], self.batch_size, count)
        answered: list[list[Answered]] = [[] for _ in self.rows]
        for (i, _), (nll, missed) in zip(self.prompts, found):
            lengths = np.array([len(e) for e in endings[i]]) if self.mean else 1
            answered[i].append(answer(self.rows[i], self.candidates[i], texts[i], nll / lengths, missed))
        return answered


def answer(
    row: Row, candidates: Sequence[str], texts: Sequence[str], nll: np.ndarray, missed: np.ndarray
) -> Answered:
    """What a wording gives: ``texts`` are the candidates and then answers that are none, with their ``nll`` and how
    many of their tokens greedy decoding would not write."""
    right = np.array([text in row["answers"] for text in texts])
    listed = np.arange(len(texts)) < len(candidates)
    said = bool((missed[right] == 0).any())
    if not len(candidates):
        return Answered(None, 0, said)
    rank = 1 + int((nll[listed & ~right] <= nll[listed & right].min()).sum())
    return Answered(texts[int(np.argmin(nll[: len(candidates)]))], rank, said)
