"""SARI: what a simplification kept, dropped and added, beside the source and the references.

Xu, Napoles, Pavlick, Chen and Callison-Burch 2016 (TACL 4), in the form of tensor2tensor and Hugging Face's ``sari``:
by sentence, n-grams up to 4, recall of what is kept over n-gram counts. EASSE's corpus form is another number.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxcl.metrics.overlap import f_measure

ORDER = 4


class Sari(NamedTuple):
    """Each 0 to 1: F1 of what is kept, precision of what is deleted, F1 of what is added; `score` is their mean."""

    keep: float
    delete: float
    add: float

    @property
    def score(self) -> float:
        return (self.keep + self.delete + self.add) / 3


def sari(source: str, prediction: str, references: Sequence[str]) -> Sari:
    """Means over n = 1..4 of one sentence's three parts; texts are lower-cased and split by sacrebleu's 13a."""
    texts = [_words(text) for text in (source, prediction, *references)]
    parts = [_order(*([_ngrams(words, n) for words in texts])) for n in range(1, ORDER + 1)]
    return Sari(*(sum(column) / ORDER for column in zip(*parts)))


@functools.cache
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _words(text: str) -> list[str]:
    return _tokenizer()(text.lower()).split()


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _share(part: float, whole: float) -> float:
    """1 where there was nothing to get right."""
    return part / whole if whole else 1.0


def _order(source: Counter, prediction: Counter, *references: Counter) -> tuple[float, float, float]:
    """(keep, delete, add) of one n-gram order. Counts of source and prediction are taken once for every reference, so
    that an n-gram which half of the references hold is half right."""
    target = sum(references, Counter())
    old = Counter({gram: n * len(references) for gram, n in source.items()})
    new = Counter({gram: n * len(references) for gram, n in prediction.items()})

    def precision(done: Counter, right: Counter) -> float:
        return _share(sum(right[gram] / done[gram] for gram in right), len(done))

    kept, keepable = old & new, old & target
    recall = _share((kept & target).total(), keepable.total())
    dropped = old - new
    added, addable = new.keys() - old.keys(), target.keys() - old.keys()
    right = len(added & addable)
    return (
        f_measure(precision(kept, kept & target), recall),
        precision(dropped, dropped - target),
        f_measure(_share(right, len(added)), _share(right, len(addable))),
    )
