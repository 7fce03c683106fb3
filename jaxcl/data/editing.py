"""Knowledge edits: rows of the ``edit`` schema as one stage, and the prompts that measure what it did.

ZsRE and CounterFact as WISE and GRACE use them: ``editing/<name>/{edit,train,dev}.jsonl.gz`` in the data directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcl.data.encode import encode
from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.data.stage import Rows
from jaxcl.errors import RequestError, unknown

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

ABOUT = ("edit", "rephrase", "locality", "truth")


class Asked(NamedTuple):
    """A prompt and the answer that counts, which follows it after a space."""

    id: str
    prompt: str
    answer: str

    def ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer, without an end mark: the reference trains none."""
        return tokenizer.encode(self.prompt), tokenizer.encode(" " + self.answer)


def edit_records(
    name: str, data_dir: str | Path | None = None, *, split: str = "edit", rows: int | None = None
) -> list[dict[str, Any]]:
    """The first ``rows`` records (all where None) of ``editing/<name>/<split>``, in the stream's order.

    RequestError: an unknown name, no such file, malformed rows, fewer rows than asked for.
    """
    folder = data_folder("editing", data_dir)
    known = sorted(f.name for f in folder.iterdir() if f.is_dir())
    if name not in known:
        raise unknown("edits", name, known, where=str(folder))
    records = read_rows(folder / name / f"{split}.jsonl.gz", "edit")
    if rows is not None and not 1 <= rows <= len(records):
        raise RequestError(f"rows={rows} of editing/{name}: accepted: 1 to {len(records)}, or null for all")
    return records[:rows]


def asked(records: Sequence[dict[str, Any]], about: str) -> list[Asked]:
    """What is asked about edits: the ``edit`` itself, every ``rephrase`` of it, the unrelated prompt of its
    ``locality``, or the ``truth``, the answer before the edit. Records that have none give none."""
    if about not in ABOUT:
        raise unknown("kind of question", about, ABOUT)
    if about == "edit":
        return [Asked(r["id"], r["prompt"], r["target"]) for r in records]
    if about == "locality":
        return [Asked(r["id"], r["locality_prompt"], r["locality_target"]) for r in records if r["locality_target"]]
    if about == "truth":
        return [Asked(r["id"], r["prompt"], r["target_true"]) for r in records if r.get("target_true")]
    wordings = [(r, i, text) for r in records for i, text in enumerate(r.get("rephrases") or ())]
    return [Asked(f"{r['id']}/{i}", text, r["target"]) for r, i, text in wordings]


def edit_source(
    name: str,
    records: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int | None = None,
    targets: int | None = None,
) -> Rows:
    """Edits as training rows, one edit a row. window: tokens of a row, default those of the longest. targets: tokens of
    an answer, default the longest one's; stages of one stream share it.

    RequestError: no records, an id twice, an edit that is longer than the window.
    """
    pairs = [one.ids(tokenizer) for one in asked(records, "edit")]
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    size = window or max(lengths, default=1)
    for record, length in zip(records, lengths):
        if length > size:
            raise RequestError(f"edit {record['id']!r} has {length} tokens; accepted: up to {size} (window)")
    k = max((len(answer) for _, answer in pairs), default=0) if targets is None else targets

    def encode_row(i: int) -> dict[str, Any]:
        prompt, answer = pairs[i]
        return encode(np.array(prompt, np.int32), answer, size, k, pad=tokenizer.pad_id, row=i)

    return Rows(name, records, encode_row, lambda _: name)
