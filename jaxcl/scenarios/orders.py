"""Orders of a stream's stages: at random by a seed, or so that neighbours are alike (M2D2, Reid et al. 2022)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Settings, StreamInfo

_WORD = re.compile(r"\w+")


def ordered(info: StreamInfo, settings: Settings) -> tuple[str, ...]:
    """The stages in the order that ``settings`` name. RequestError where a stream has no texts to compare."""
    if settings.order == "random":
        drawn = np.random.default_rng([settings.seed, 11]).permutation(len(info.stages))
        return tuple(info.stages[i] for i in drawn)
    texts = {stage: info.texts(info, stage, settings) for stage in info.stages}
    if not all(texts.values()):
        raise RequestError(f"stream {info.name!r} has no texts to order by similarity; accepted: given, random")
    return tuple(info.stages[i] for i in chained(term_vectors([texts[s] for s in info.stages])))


def chained(vectors: np.ndarray) -> list[int]:
    """A permutation of the rows of f64[n, d]: the first one, then always the one left whose cosine to the last is
    highest (of equals the earlier)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    order, left = [0], list(range(1, len(vectors)))
    while left:
        near = unit[left] @ unit[order[-1]]
        order.append(left.pop(int(np.argmax(near))))
    return order


def term_vectors(groups: Sequence[Sequence[str]]) -> np.ndarray:
    """f64[groups, words]: frequencies of each group's words, those that every group has weighing least (tf-idf)."""
    counts = [Counter(w for text in texts for w in _WORD.findall(text.lower())) for texts in groups]
    known = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    rarity = {w: math.log(1 + len(groups) / sum(w in c for c in counts)) for w in known}
    out = np.zeros((len(groups), len(known)))
    for row, count in zip(out, counts):
        for word, n in count.items():
            row[known[word]] = n / count.total() * rarity[word]
    return out
