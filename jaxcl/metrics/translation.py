"""BLEU and chrF as sacrebleu's sufficient statistics, which add up over items, and the signature beside them.

The corpus score is made of summed statistics (`jaxcl.metrics.pooling`), never a mean of sentence scores.
Papineni et al. 2002; Popovic 2015; Post 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


@functools.cache
def scorer(name: str) -> Any:
    """sacrebleu's metric 'bleu' or 'chrf' with its default settings (13a, exponential smoothing; chrF2)."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


def statistics(prediction: str, references: Sequence[str], *, name: str) -> list[float]:
    """Of one item, in sacrebleu's order. bleu: length of the prediction, of the closest reference, right n-grams
    (1 to 4), n-grams (1 to 4). chrf: for 1 to 6 characters the n-grams of the prediction, of the reference, both."""
    found = scorer(name)._extract_corpus_statistics([prediction], [[reference] for reference in references])
    return [float(x) for x in found[0]]


def signature(name: str, references: int = 1) -> str:
    """sacrebleu's signature of 'bleu' or 'chrf' where every item has so many references."""
    how = {"bleu": "case:mixed|eff:no|tok:13a|smooth:exp", "chrf": "case:mixed|eff:yes|nc:6|nw:0|space:no"}[name]
    return f"nrefs:{references}|{how}|version:{version('sacrebleu')}"
