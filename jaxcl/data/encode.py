"""Rows become arrays of a fixed shape; what is too long loses input text, never its answer.

Suffix letters: T tokens of the window, K targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.template import Template
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray

Example = dict[str, Any]
"""One row without a batch axis: tokens, segments, positions i32[T]; targets_at i32[K] and weight f32[K], or
weight f32[T] alone for plain text; row i32[]."""


def encode(
    prompt: Ids, target: Sequence[int], window: int, k: int, *, pad: int = 0, row: int = -1
) -> Example:
    """Prompt and target ids as one example; ``targets_at``: where each target token stands (0: unused slot).

    RequestError where prompt and target are longer than the window T or the target longer than K.
    """
    length = len(prompt) + len(target)
    if length > window or len(target) > k or not len(prompt):
        raise RequestError(
            f"row {row}: a prompt of {len(prompt)} and a target of {len(target)} tokens do not fit "
            f"into a window of {window} tokens with room for {k} targets after at least one token of prompt"
        )
    example = _row([*prompt, *target], window, pad, row)
    targets_at, weight = np.zeros(k, np.int32), np.zeros(k, np.float32)
    targets_at[: len(target)] = np.arange(len(prompt), length)
    weight[: len(target)] = 1.0
    return example | {"targets_at": targets_at, "weight": weight}


def encode_text(ids: Ids, window: int, *, starts: Ids = (), pad: int = 0, row: int = -1) -> Example:
    """Plain text: every token but the first is a target, ``weight`` f32[T].

    starts: where in ``ids`` further documents begin; each is a segment of its own: its positions restart, it sees
    nothing of the ones before, and its first token is no target, like that of the row.
    """
    if not 0 < len(ids) <= window:
        raise RequestError(f"row {row}: a text of {len(ids)} tokens does not fit into a window of {window}")
    example = _row(ids, window, pad, row)
    for start in starts:
        example["segments"][start : len(ids)] += 1
        example["positions"][start : len(ids)] = np.arange(len(ids) - start)
    weight = (example["positions"] > 0).astype(np.float32)
    return example | {"weight": weight}


def target_ids(row: dict[str, Any], template: Template, tokenizer: Tokenizer) -> list[int]:
    """The row's answer as ids, end-of-sequence token included."""
    return [*tokenizer.encode(template.target(row["target"])), tokenizer.eos_id]


def begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a sequence that begins with ``text``: after what the model's sequences start with, unless the text (of a
    chat template) has it already."""
    ids, start = tokenizer.encode(text), list(getattr(tokenizer, "start", ()))
    return ids if ids[: len(start)] == start else [*start, *ids]


def fit_prompt(row: dict[str, Any], template: Template, tokenizer: Tokenizer, room: int) -> list[int]:
    """Ids of the row's prompt in at most ``room`` tokens.

    Only the end of the input is cut off: instruction, options and ``Answer:`` stay, and the result is always
    the encoding of a text. RequestError where they alone need more than ``room``.
    """
    ids = begun(tokenizer, template.prompt(row, tokenizer))
    text = row["input"]
    kept = tokenizer.encode(text)
    while len(ids) > room:
        if not text:
            raise RequestError(
                f"row {row['id']!r}: instruction, options and answer mark need {len(ids)} tokens, "
                f"{room} are left by the window and the target; take a larger window"
            )
        kept = kept[: max(len(kept) - (len(ids) - room), 0)]
        text = _beginning(tokenizer, row["input"], kept)
        ids = begun(tokenizer, template.prompt(row, tokenizer, text))
    return ids


def check_frames(
    rows: Sequence[dict[str, Any]], rooms: Sequence[int], template: Template, tokenizer: Tokenizer
) -> None:
    """RequestError, as in `fit_prompt`, where some row's prompt would not fit its room even without an input.

    Every distinct instruction with its options is looked at once, so this is cheap before a long run.
    """
    seen = set()
    for row, room in zip(rows, rooms):
        frame = (row["task"], row["instruction"], *(row.get("labels") or ()), room)
        if frame not in seen:
            seen.add(frame)
            fit_prompt(row | {"input": ""}, template, tokenizer, room)


def _beginning(tokenizer: Tokenizer, text: str, kept: list[int]) -> str:
    """The part of a text that its first tokens ``kept`` stand for."""
    if getattr(tokenizer, "lossy", False):
        return tokenizer.beginning(text, len(kept))  # type: ignore[attr-defined]
    # a cut inside a character decodes to a replacement mark: keep what is really a beginning of the input
    return _common_start(text, tokenizer.decode(kept))


def _common_start(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:n]


def _row(ids: Ids, window: int, pad: int, row: int) -> Example:
    length = len(ids)
    tokens = np.full(window, pad, np.int32)
    segments, positions = np.zeros(window, np.int32), np.zeros(window, np.int32)
    tokens[:length] = ids
    segments[:length] = 1
    positions[:length] = np.arange(length)
    return {"tokens": tokens, "segments": segments, "positions": positions, "row": np.int32(row)}
