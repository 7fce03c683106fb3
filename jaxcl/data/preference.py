"""Pairs of answers as training rows: the chosen one is the target. Rows of the ``preference`` schema.

Only the chosen answers are learned (supervised fine-tuning on preferences); what a model prefers is measured on pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import begun, encode
from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.data.stage import Rows
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]


def preference_rows(name: str, split: str, data_dir: str | Path | None = None) -> list[Row]:
    """Rows of ``preference/<name>/<split>``; RequestError: no such file, malformed rows."""
    return read_rows(data_folder("preference", data_dir) / name / f"{split}.jsonl.gz", "preference")


def answer_ids(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The chosen answer as ids, after a space and with its end mark."""
    return [*tokenizer.encode(" " + row["chosen"].strip()), tokenizer.eos_id]


def chosen_that_fit(rows: Sequence[Row], tokenizer: Tokenizer, window: int) -> list[Row]:
    """The rows whose chosen answer leaves a quarter of the window to the prompt; no answer is cut.

    RequestError: there are none."""
    kept = [row for row in rows if len(answer_ids(row, tokenizer)) <= window - window // 4]
    if not kept:
        raise RequestError(f"no chosen answer of {len(rows)} fits into 3/4 of {window} tokens; take a larger window")
    return kept


def chosen_source(name: str, records: Sequence[Row], tokenizer: Tokenizer, *, window: int, targets: int) -> Rows:
    """Prompt and chosen answer as training rows. targets: tokens of an answer. A dialogue that is too long loses its
    beginning. RequestError: no rows, an id twice, an answer that does not fit the window."""
    pairs: dict[int, tuple[list[int], list[int]]] = {}

    def encode_row(i: int) -> dict[str, Any]:
        if i not in pairs:
            answer = answer_ids(records[i], tokenizer)
            pairs[i] = begun(tokenizer, records[i]["prompt"].rstrip())[-(window - len(answer)) :], answer
        prompt, answer = pairs[i]
        return encode(np.array(prompt, np.int32), answer, window, targets, pad=tokenizer.pad_id, row=i)

    return Rows(name, records, encode_row, lambda _: name)
