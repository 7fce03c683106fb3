"""Documents packed into blocks of one length, for continual pre-training: the ``text`` schema as a stage's rows.

Documents stand one after another, an end-of-sequence token after each, and are cut every ``window`` tokens. Nothing
is lost or repeated: every token of every document, and every end mark, stands in exactly one block.

Documents are read once, one at a time; their tokens go to a temporary file that is mapped, so neither the texts nor
the tokens of a large corpus need fit into memory. Padding is in the last block only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import Example, begun, encode_text
from jaxcl.errors import RequestError, RunFailed

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Documents = Iterable[dict[str, Any] | str]


class Blocks:
    """A `Source` whose rows are blocks; a block's label is the stage's name. packs: whether a block may hold several
    documents that do not see each other, which methods of whole sequences cannot take.

    ids: int32 of all tokens; ends: int64, where each document's end mark is passed.
    """

    def __init__(
        self, name: str, ids: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer, window: int, separate: bool
    ) -> None:
        self.name, self.packs = name, separate
        self._ids, self._ends, self._tokenizer, self._window = ids, ends, tokenizer, window

    def __len__(self) -> int:
        return -(-len(self._ids) // self._window)

    def __getitem__(self, i: int) -> Example:
        start, ids = self._block(i)
        starts = self._inside(start, start + len(ids)) - start if self.packs else ()
        return encode_text(ids, self._window, starts=starts, pad=self._tokenizer.pad_id, row=i)

    def label(self, i: int) -> str:
        return self.name

    def record(self, i: int) -> dict[str, Any]:
        """The block's text, decoded; a character that the cut runs through is replaced by a mark."""
        return {"id": self.id(i), "task": self.name, "text": self._tokenizer.decode(self._block(i)[1].tolist())}

    def id(self, i: int) -> str:
        return f"{self.name}-{range(len(self))[i]}"

    def _inside(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin after the token ``start`` and before ``stop``."""
        first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left")
        return self._ends[first:last]

    def _block(self, i: int) -> tuple[int, np.ndarray]:
        start = range(len(self))[i] * self._window
        return start, np.asarray(self._ids[start : start + self._window])


def text_source(
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    window: int,
    blocks: int | None = None,
    separate: bool = False,
) -> Blocks:
    """Documents (``text`` rows or strings, any iterable) in blocks of ``window`` tokens.

    separate: a document sees nothing of those before it in its block: its own segment, positions from 0, and no
    target at its first token; else a block is one sequence whose tokens are all targets but the first. blocks: at most
    so many, the first ones; documents beyond them are not read. RequestError: no documents, or such a number below 1.
    """
    for what, value in (("window", window), ("blocks", 1 if blocks is None else blocks)):
        if value < 1:
            raise RequestError(f"stage {name!r}: {what}={value}; accepted: a positive integer")
    ids, ends = tokenized(documents, tokenizer, most=None if blocks is None else blocks * window)
    if not len(ids):
        raise RequestError(f"stage {name!r} has no training rows")
    return Blocks(name, ids, ends, tokenizer, window, separate)


def tokenized(documents: Documents, tokenizer: Tokenizer, *, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32[N], ends int64[documents]): the documents' tokens with an end mark after each, and where they end.

    most: reading stops when so many tokens are there, and what is beyond is cut off. RunFailed: the disk is full.
    """
    ends, total = [], 0
    with tempfile.TemporaryFile() as file:
        for document in documents:
            text = document if isinstance(document, str) else document["text"]
            total += _append(file, [*begun(tokenizer, text), tokenizer.eos_id])
            ends.append(total)
            if most is not None and total >= most:
                break
        _append(file, [], flush=True)
        size = total if most is None else min(total, most)
        mapped = np.memmap(file, np.int32, "r", shape=(size,)) if size else np.zeros(0, np.int32)
    return mapped, np.array(ends, np.int64)


def _append(file: IO[bytes], ids: list[int], *, flush: bool = False) -> int:
    try:
        file.write(np.array(ids, np.int32).tobytes())
        if flush:
            file.flush()
    except OSError as error:
        raise RunFailed(f"tokens cannot be written to {tempfile.gettempdir()}: {error.strerror or error}") from error
    return len(ids)
