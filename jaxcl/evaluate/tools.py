"""Tool calls in written answers: the right tool, the right arguments, and calls that nobody asked for.

Card refine-align/tool-lifelong. Every turn offers all tools so far; a turn that wants words is scored for having no
call, and its words against the reply. The parser never runs what it reads (`jaxcl.data.tools`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcl.data.tools import normalised, read_calls
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, shared
from jaxcl.evaluate.generation import written
from jaxcl.metrics.overlap import lenient
from jaxcl.metrics.pooling import pooled
from jaxcl.metrics.text import TEXT_METRICS
from jaxcl.metrics.tools import Call, Calls, same_calls, same_tools, same_value

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]


class Score(NamedTuple):
    """about(row): whether the row counts. of(row, text, its calls) -> score, or parts where ``pool`` is set."""

    about: Callable[[Row], bool]
    of: Callable[[Row, str, Calls], Any]
    pool: str | None = None
    higher_is_better: bool = True


def _wanted(row: Row) -> list[Call]:
    return [Call(call["name"], normalised(call["arguments"] or {})) for call in row["calls"]]


def _asks(row: Row) -> bool:
    return bool(row["calls"])


def _complete(row: Row) -> bool:
    return _asks(row) and all(call["arguments"] is not None for call in row["calls"])


def _same_arguments(row: Row, text: str, said: Calls) -> float:
    wanted = _wanted(row)
    same = len(said) == len(wanted) and all(same_value(s.arguments, w.arguments) for s, w in zip(said, wanted))
    return float(same)


def argument_counts(said: Calls, wanted: Calls) -> list[float]:
    """True positives, false positives, false negatives over single arguments, calls compared in order: an argument is
    right where name and value are, whatever the tool; arguments of missing and of extra calls count too."""
    right = made = asked = 0
    for at in range(max(len(said), len(wanted))):
        s: Mapping[str, Any] = said[at].arguments if at < len(said) else {}
        w: Mapping[str, Any] = wanted[at].arguments if at < len(wanted) else {}
        right += sum(key in s and same_value(s[key], value) for key, value in w.items())
        made, asked = made + len(s), asked + len(w)
    return [float(right), float(made - right), float(asked - right)]


def _answer(row: Row, text: str, said: Calls) -> float:
    return float(not said and lenient(text) == lenient(str(row["answer"])))


def _reply(row: Row, text: str, said: Calls) -> float:
    return 0.0 if said else TEXT_METRICS["rougeL_f1"].of(text, [row["target"]])


SCORES: dict[str, Score] = {
    "tool_call_accuracy": Score(_asks, lambda row, text, said: float(same_tools(said, _wanted(row)))),
    "tool_arguments_equal": Score(_complete, _same_arguments),
    "tool_argument_f1": Score(_complete, lambda row, text, said: argument_counts(said, _wanted(row)), "f1_micro"),
    "tool_argument_accuracy": Score(_complete, lambda row, text, said: float(same_calls(said, _wanted(row)))),
    "over_trigger_rate": Score(lambda row: not _asks(row), lambda row, text, said: float(len(said) > 0), None, False),
    "tool_reply_rougeL_f1": Score(lambda row: not _asks(row), _reply),
    "tool_answer_accuracy": Score(lambda row: not _asks(row) and row.get("answer") is not None, _answer),
}
"""tool_call_accuracy: the wanted tools, whatever the arguments. tool_arguments_equal: the wanted arguments, whatever
the tool. tool_argument_accuracy: both. over_trigger_rate: calls where words are wanted. tool_reply_rougeL_f1: the words
against the reply (API-Bank), 0 for a call. tool_answer_accuracy: of turns with a final ``answer``, lenient equality."""


def tool_calls(
    eval_id: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    window: int,
    by: Sequence[str] | None = None,
    role: str = "task",
    **how: Any,
) -> list[Eval]:
    """An eval ``eval_id/name`` for each of ``by`` (names of `SCORES`; default: all that some row is about), from one
    pass of generation. Each is over the rows that it is about, so their numbers of items differ.

    rows: those of `jaxcl.data.tools.turns`. how: as for `jaxcl.evaluate.generation.generation`. RequestError: also rows
    without ``calls``, an unknown name, one that no row is about.
    """
    for name in by or ():
        if name not in SCORES:
            raise unknown("score of tool calls", name, SCORES)
    for row in rows:
        if not isinstance(row.get("calls"), list):
            raise RequestError(f"eval {eval_id!r}: row {row['id']!r} does not say its calls; accepted: a list")
    about = {name: [i for i, row in enumerate(rows) if score.about(row)] for name, score in SCORES.items()}
    answers = written(eval_id, rows, tokenizer, window=window, **how)

    def read(view: Any, progress: Progress) -> list[tuple[str, list[Call]]]:
        return [(answer.text, _read(answer.text)) for answer in answers(view, progress)]

    once = shared(read)

    def made(name: str) -> Eval:
        score, members = SCORES[name], about[name]
        if not members:
            raise RequestError(f"eval {eval_id!r}: no row that {name} is about")

        def run(view: Any, progress: Progress) -> list[Item]:
            found = once(view, progress)
            return [_item(score, rows[i], *found[i]) for i in members]

        return Eval(
            f"{eval_id}/{name}",
            name,
            len(members),
            run,
            higher_is_better=score.higher_is_better,
            role=role,
            pool=score.pool,
            hparams=answers.how.hparams(),
        )

    return [made(name) for name in (by or [name for name in SCORES if about[name]])]


def _read(text: str) -> list[Call]:
    return [Call(call.name, normalised(call.arguments)) for call in read_calls(text)]


def _item(score: Score, row: Row, text: str, said: Calls) -> Item:
    value = score.of(row, text, said)
    item = {"id": row["id"], "prediction": text.strip()}
    if score.pool is None:
        return {**item, "score": float(value)}
    return {**item, "score": pooled([{"parts": value}], score.pool), "parts": value}
