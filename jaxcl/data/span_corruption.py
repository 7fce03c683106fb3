"""Text with spans cut out, as T5 is pre-trained: the source has a sentinel for each span, the target has the spans.

Raffel et al. 2020, section 3.1.4: 15% of the tokens in spans of 3 on average; each span becomes one sentinel that no
other span of the row has; the target is the spans, each behind its sentinel, and a last sentinel. How many tokens and
spans follows from the length alone (the T5 code's `random_spans_noise_mask`), so all rows of a window have one shape.
Sentinels are the ids at the top of the vocabulary, downwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.blocks import Documents, tokenized
from jaxcl.data.encode import Example, encode
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

SHARE, SPAN, SENTINELS = 0.15, 3.0, 100


def counts(length: int, share: float = SHARE, span: float = SPAN) -> tuple[int, int]:
    """(tokens that are cut out, spans they stand in) of a text of ``length`` tokens, at least 2: at least one of each,
    at least one token stays, and no more spans than tokens on either side."""
    noise = min(max(round(length * share), 1), length - 1)
    return noise, max(min(round(noise / span), noise, length - noise), 1)


def noise_mask(length: int, rng: np.random.Generator, share: float = SHARE, span: float = SPAN) -> np.ndarray:
    """bool[length]: which tokens are cut out. Kept and cut stretches take turns, a kept one first, a cut one last;
    their lengths are random partitions of the two numbers of tokens."""
    noise, spans = counts(length, share, span)
    kept, cut = parts(length - noise, spans, rng), parts(noise, spans, rng)
    return np.repeat(np.tile([False, True], spans), np.stack([kept, cut], axis=1).ravel())


def parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64[count] above 0 with the sum ``total``; every such partition is as likely as another."""
    borders = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


def corrupted(ids: np.ndarray, mask: np.ndarray, top: int) -> tuple[list[int], list[int]]:
    """(source, target) of ids under a `noise_mask`; the sentinels are ``top``, ``top`` - 1, ..."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    number = np.cumsum(starts) - 1
    source = [top - n if begins else i for i, begins, n, cut in zip(ids, starts, number, mask) if begins or not cut]
    target: list[int] = []
    for i, begins, n in zip(ids[mask], starts[mask], number[mask]):
        target += [top - n, i] if begins else [i]
    last = top - int(starts.sum())
    return [int(i) for i in source], [*map(int, target), last]


def raw_length(window: int, share: float = SHARE, span: float = SPAN) -> int:
    """Tokens of text that a row of ``window`` tokens holds, source and target with its end mark. RequestError where not
    even two fit."""
    fits = [n for n in range(2, window) if sum(sizes(n, share, span)) <= window]
    if not fits:
        raise RequestError(f"window={window}: no text with a span cut out fits; accepted: at least 7 tokens")
    return fits[-1]


def sizes(length: int, share: float, span: float) -> tuple[int, int]:
    """(tokens of the source, of the target with its end mark) of a text of ``length`` tokens."""
    noise, spans = counts(length, share, span)
    return length - noise + spans, noise + spans + 2


class Corrupted:
    """A `Source` whose rows are stretches of text with spans cut out, as prompt and answer. The cuts of row i are drawn
    by (seed, i): the same whenever it is read."""

    def __init__(
        self, name: str, ids: np.ndarray, tokenizer: Tokenizer, window: int,
        share: float, span: float, top: int, seed: int,
    ) -> None:  # fmt: skip
        self.name, self._ids, self._tokenizer, self._window = name, ids, tokenizer, window
        self._share, self._span, self._top, self._seed = share, span, top, seed
        self._raw = raw_length(window, share, span)
        self._targets = max(sizes(n, share, span)[1] for n in range(2, self._raw + 1))

    def __len__(self) -> int:
        return max((len(self._ids) + self._raw - 2) // self._raw, 1)  # a last token alone has nothing to cut

    def __getitem__(self, i: int) -> Example:
        source, target = self._cut(i)
        answer = [*target, self._tokenizer.eos_id]
        return encode(source, answer, self._window, self._targets, pad=self._tokenizer.pad_id, row=i)

    def label(self, i: int) -> str:
        return self.name

    def record(self, i: int) -> dict[str, Any]:
        """The stretch of text as it was; a character that a border runs through is replaced by a mark."""
        return {"id": self.id(i), "task": self.name, "text": self._tokenizer.decode(self._block(i).tolist())}

    def id(self, i: int) -> str:
        return f"{self.name}-{range(len(self))[i]}"

    def _block(self, i: int) -> np.ndarray:
        start = range(len(self))[i] * self._raw
        return np.asarray(self._ids[start : start + self._raw])

    def _cut(self, i: int) -> tuple[list[int], list[int]]:
        ids = self._block(i)
        rng = np.random.default_rng([self._seed, range(len(self))[i]])
        return corrupted(ids, noise_mask(len(ids), rng, self._share, self._span), self._top)


def corrupted_source(
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    window: int,
    share: float = SHARE,
    span: float = SPAN,
    top: int | None = None,
    sentinels: int = SENTINELS,
    seed: int = 0,
) -> Corrupted:
    """Documents (``text`` rows or strings), one after another with an end mark behind each, as rows of at most
    ``window`` tokens, source and target together.

    share: of the tokens that are cut out. span: tokens of a span on average. top: the first sentinel's id, the
    vocabulary's last unless given; ``sentinels``: how many there are, downwards. RequestError: a share outside (0, 1),
    a span below 1, no text, a window too small or with more spans than there are sentinels, sentinels that are marks.
    """
    if not 0 < share < 1 or span < 1:
        raise RequestError(f"stage {name!r}: share {share}, span {span}; accepted: 0 < share < 1, span of at least 1")
    top = tokenizer.vocab_size - 1 if top is None else top
    needed = counts(raw_length(window, share, span), share, span)[1] + 1
    if needed > min(sentinels, top + 1):
        raise RequestError(
            f"stage {name!r}: a window of {window} tokens needs {needed} sentinels; accepted: windows for {sentinels}"
        )
    taken = [i for i in (tokenizer.eos_id, tokenizer.pad_id) if top - needed < i <= top]
    if taken:
        where = f"stage {name!r}: sentinels from {top} downwards"
        raise RequestError(f"{where} reach {taken[0]}, which marks an end; give top")
    ids, _ = tokenized(documents, tokenizer)
    if len(ids) < 2:
        raise RequestError(f"stage {name!r} has no training rows")
    return Corrupted(name, ids, tokenizer, window, share, span, top, seed)
