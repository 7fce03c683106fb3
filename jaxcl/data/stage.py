"""Stages and their training rows. A stage has no way to its test rows: those live in evals only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxcl.data.blocks import text_source as text_source  # beside its sibling, `instruct_source`
from jaxcl.data.encode import Example, check_frames, encode, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


class Source(Protocol):
    """Training rows of one stage, in a fixed order and of one shape."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Example: ...
    def label(self, i: int) -> str:
        """The row's class, or its stage's name where it has none: what class-balanced memories count."""

    def record(self, i: int) -> dict[str, Any]:
        """The row as it was read: strings, not arrays."""

    def id(self, i: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """A name, the rows to train on, and the ids of the evals that it teaches (names, not rows)."""

    name: str
    train: Source
    evals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.train):
            raise RequestError(f"stage {self.name!r} has no training rows")


class Rows:
    """A `Source` over records in memory; a row becomes arrays each time it is read.

    records: dicts with an ``id`` that is unique (RequestError otherwise). encode_row(i) -> Example.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[dict[str, Any]],
        encode_row: Callable[[int], Example],
        label: Callable[[dict[str, Any]], str],
    ) -> None:
        self.name = name
        self._records = list(records)
        self._encode = encode_row
        self._label = label
        if not self._records:
            raise RequestError(f"stage {name!r} has no training rows")
        seen: set[str] = set()
        for record in self._records:
            if record["id"] in seen:
                raise RequestError(f"stage {name!r}: id {record['id']!r} occurs twice")
            seen.add(record["id"])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Example:
        return self._encode(range(len(self))[i])

    def label(self, i: int) -> str:
        return self._label(self._records[i])

    def record(self, i: int) -> dict[str, Any]:
        return self._records[i]

    def id(self, i: int) -> str:
        return self._records[i]["id"]


def instruct_source(
    name: str,
    records: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    k: int | None = None,
    template: Template | None = None,
    label: Callable[[dict[str, Any]], str] | None = None,
) -> Rows:
    """Rows of the ``instruct`` schema. k: targets per row (default: the longest target here). label: what
    `Source.label` says of a row (default: its target where it has labels, else the stage's name).

    RequestError, before anything is trained: a target longer than the window or than k, or a row whose
    instruction and options leave no room for it.
    """
    template = template or Template()
    targets = target_table(records, template, tokenizer)
    k = max((len(ids) for ids in targets.values()), default=0) if k is None else k
    _check_fit(records, targets, template, tokenizer, window, k)

    prompts: dict[int, np.ndarray] = {}  # tokenised once; the padded arrays would be many times as large

    def encode_row(i: int) -> Example:
        target = targets[records[i]["target"]]
        if i not in prompts:
            ids = fit_prompt(records[i], template, tokenizer, window - len(target))
            prompts[i] = np.array(ids, np.int32)
        return encode(prompts[i], target, window, k, pad=tokenizer.pad_id, row=i)

    return Rows(name, records, encode_row, label or (lambda row: row["target"] if row.get("labels") else name))


def target_table(
    records: Sequence[dict[str, Any]], template: Template, tokenizer: Tokenizer
) -> dict[str, list[int]]:
    """{answer: its ids with the end-of-sequence token}, every distinct answer encoded once."""
    first = {row["target"]: row for row in records}
    return {answer: target_ids(row, template, tokenizer) for answer, row in first.items()}


def subsample(records: Sequence[dict[str, Any]], rows: int | None, seed: int) -> list[dict[str, Any]]:
    """``rows`` of the records, drawn without replacement by ``seed``, in their old order; all where None."""
    if rows is None or rows >= len(records):
        return list(records)
    if rows < 1:
        raise RequestError(f"rows={rows}: a stage needs rows; accepted: a positive integer or null")
    chosen = np.random.default_rng(seed).permutation(len(records))[:rows]
    return [records[i] for i in np.sort(chosen)]


def _check_fit(
    records: Sequence[dict[str, Any]],
    targets: dict[str, list[int]],
    template: Template,
    tokenizer: Tokenizer,
    window: int,
    k: int,
) -> None:
    for row in records:
        length = len(targets[row["target"]])
        if length >= window or length > k:
            most = min(window - 1, k)
            raise RequestError(
                f"row {row['id']!r}: its target has {length} tokens with the end mark, at most {most} fit "
                f"(window {window}, targets per row {k})"
            )
    check_frames(records, [window - len(targets[row["target"]]) for row in records], template, tokenizer)
