"""Rows that a model wrote: how many, which of them are good, and their way into arrays and examples and back to text.

Card cft/generative-replay. A row is written as prompt, mark, answer; what has another form is refused and counted.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcl.data.encode import Example, encode

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

REASONS = ("boundary", "length", "labels")
"""Why a row is refused: not exactly one mark or no end; too long, or one part empty; an answer that is no label."""
MOST_LABELS = 64  # a stage with more distinct answers is a free-form one: it has no label set


class Item(NamedTuple):
    """Token ids of a prompt, and of an answer with its end mark."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def quota(rows: int, tasks: int, gamma: float | None = None, count: int | None = None) -> int:
    """Rows to ask for of each of ``tasks`` old tasks: ``count``, or floor(gamma * rows) in equal parts, rounded down to
    a multiple of the tasks. 0 where there is no old task."""
    if count is not None or not tasks:
        return count if count and tasks else 0
    return math.floor((gamma or 0.0) * rows + 1e-9) // tasks


def separate(ids: Sequence[int], ended: bool, mark: int, end: int) -> Item | None:
    """Prompt and answer (``end`` added) around the only ``mark`` in ids; None unless there is exactly one and the text
    ended by itself."""
    ids = tuple(int(i) for i in ids)
    if not ended or ids.count(mark) != 1:
        return None
    at = ids.index(mark)
    return Item(ids[:at], (*ids[at + 1 :], end))


def verdict(item: Item | None, window: int, targets: int, labels: frozenset | None = None) -> str:
    """'accepted' or the first of `REASONS` to refuse a row. window, targets: what an example holds. labels: accepted
    answers, end mark included; None or none of them: any."""
    if item is None:
        return "boundary"
    long = len(item.prompt) + len(item.answer) > window or len(item.answer) > targets
    if long or not item.prompt or len(item.answer) < 2:
        return "length"
    return "labels" if labels and item.answer not in labels else "accepted"


def sift(
    items: Sequence[Item | None], window: int, targets: int, labels: frozenset | None = None
) -> tuple[list[Item], dict[str, int]]:
    """(accepted items in order, {'requested', 'accepted' and every reason: how many})."""
    said = [verdict(item, window, targets, labels) for item in items]
    seen = Counter(said)
    counts = {"requested": len(items), "accepted": seen["accepted"], **{r: seen[r] for r in REASONS}}
    return [i for i, v in zip(items, said, strict=True) if v == "accepted" and i is not None], counts


def diverse(vectors: np.ndarray, clusters: int, keep: int, seed: int) -> np.ndarray:
    """int64[min(keep, N)], sorted: rows of f32[N,D] nearest to the centroids of k-means, the nearest of each cluster
    first, then the second of each and so on (SSR, Huang et al. 2024, keeps ten of each of 20)."""
    from scipy.cluster.vq import kmeans2

    if len(vectors) <= keep:
        return np.arange(len(vectors))
    with warnings.catch_warnings():  # an empty cluster, where rows are equal, is no news
        warnings.simplefilter("ignore")
        points = vectors.astype(np.float64)
        centres, label = kmeans2(points, min(clusters, len(vectors)), minit="++", seed=np.random.default_rng(seed))
    distance = np.linalg.norm(points - centres[label], axis=1)
    order = np.lexsort((distance, label))
    rank = np.empty(len(order), np.int64)
    for c in np.unique(label):
        members = order[label[order] == c]
        rank[members] = np.arange(len(members))
    return np.sort(np.lexsort((distance, rank))[:keep])


def rows_of(batch: Mapping[str, Any]) -> list[Item]:
    """The rows of a batch of examples, masked ones left out."""
    items = []
    for tokens, at, row in zip(batch["tokens"], batch["targets_at"], batch["row"], strict=True):
        if row >= 0:
            places = at[at > 0]
            items.append(Item(tuple(tokens[: places[0]].tolist()), tuple(tokens[places].tolist())))
    return items


def padded(rows: Sequence[Sequence[int]], width: int | None = None, fill: int = -1) -> np.ndarray:
    """i32[N, width or the longest]: ragged ids, filled up on the right."""
    out = np.full((len(rows), width or max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def ragged(array: np.ndarray) -> list[list[int]]:
    """The inverse of `padded` with -1."""
    return [[int(i) for i in row if i >= 0] for row in array]


def pack(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """{prompts i32[N,P], answers i32[N,A]}, filled up with -1; empty where there is no item."""
    if not items:
        return {}
    return {"prompts": padded([i.prompt for i in items]), "answers": padded([i.answer for i in items])}


def unpack(arrays: Mapping[str, np.ndarray]) -> list[Item]:
    """The inverse of `pack`."""
    if not arrays:
        return []
    pairs = zip(ragged(arrays["prompts"]), ragged(arrays["answers"]), strict=True)
    return [Item(tuple(prompt), tuple(answer)) for prompt, answer in pairs]


def examples(items: Sequence[Item], window: int, targets: int, more: Mapping[str, int]) -> tuple[Example, ...]:
    """The records of a stream: examples of the shape of a stage's own, ``row`` -1 (they are of no stage's rows); more:
    further fields i32[] that the stage's have."""
    fields = {name: np.int32(value) for name, value in more.items()}
    return tuple(encode(item.prompt, item.answer, window, targets) | fields for item in items)


def texts(pseudo: Mapping[str, Mapping[str, np.ndarray]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What was written, to be read: {'stage', 'prompt', 'answer'} a row, of a memory's ``own['host']['pseudo']``."""
    return [
        {"stage": int(stage), "prompt": tokenizer.decode(item.prompt), "answer": tokenizer.decode(item.answer)}
        for stage, arrays in sorted(pseudo.items(), key=lambda pair: int(pair[0]))
        for item in unpack(arrays)
    ]
