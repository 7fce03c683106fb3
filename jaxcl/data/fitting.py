"""Which rows fit a window: answers are never cut, so a row whose answer is too long is left out, and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.data.encode import begun, target_ids
from jaxcl.data.stage import subsample
from jaxcl.data.template import Template
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]


def fitting(
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
    template: Template,
    window: int,
    *,
    most: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """({stage: ``instruct`` rows whose question, without its input, and answer fit ``window`` tokens}, {stage: how many
    were left out}). most: at most so many rows of a stage, drawn by ``seed`` from those that fit. RequestError: a
    stage of which no row fits."""
    kept, dropped = {}, {}
    for stage, of_stage in rows.items():
        fit = [row for row, frame in zip(of_stage, frames(of_stage, tokenizer, template))
               if frame + len(target_ids(row, template, tokenizer)) <= window]  # fmt: skip
        if of_stage and not fit:
            raise RequestError(
                f"stage {stage!r}: of no row do question and answer fit into {window} tokens; take a larger window"
            )
        kept[stage] = subsample(fit, most, seed)
        if len(fit) < len(of_stage):
            dropped[stage] = len(of_stage) - len(fit)
    return kept, dropped


def frames(rows: Sequence[Row], tokenizer: Tokenizer, template: Template) -> list[int]:
    """Tokens of each row's prompt without its input; every distinct instruction is encoded once."""
    known: dict[tuple[Any, ...], int] = {}
    out = []
    for row in rows:
        key = (row["task"], row["instruction"], *(row.get("labels") or ()))
        if key not in known:
            known[key] = len(begun(tokenizer, template.prompt(row, tokenizer, "")))
        out.append(known[key])
    return out


def answer_room(rows: Sequence[Row], tokenizer: Tokenizer, template: Template, window: int) -> int:
    """Tokens that an answer to one of these test rows may have: those of the longest reference, rounded up to a power
    of two (few compilations), at most half the window and no more than leaves an eighth of it for the input."""
    texts = {text for row in rows for text in row.get("targets") or [row["target"]]}
    longest = max(len(target_ids({"target": text}, template, tokenizer)) for text in texts)
    room = min(window // 2, window - max(frames(rows, tokenizer, template)) - window // 8)
    return max(1, min(1 << (longest - 1).bit_length(), room))


def ending(row: Row, tokenizer: Tokenizer, room: int) -> Row:
    """The row with the last ``room`` tokens of its input, where it is longer: for text that is to be continued."""
    ids = tokenizer.encode(row["input"])
    if len(ids) <= room:
        return row
    text = tokenizer.decode(ids[len(ids) - room :])
    # a cut inside a character decodes to a replacement mark
    while text and not row["input"].endswith(text):
        text = text[1:]
    return row | {"input": text}
