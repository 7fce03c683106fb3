"""The metrics of a written answer against its references, by name.

An answer is scored against each reference and the best one counts, but for BLEU, chrF and SARI, which take all at once.
An empty answer scores 0 and counts. Scores are shares (0 to 1), for print times 100; BLEU and chrF are 0 to 100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcl.errors import RequestError
from jaxcl.metrics import overlap, translation
from jaxcl.metrics.rouge import rouge_f1, rouge_l_trace
from jaxcl.metrics.sari import sari

CARD = "metrics/rouge-ppl"


@dataclass(frozen=True, kw_only=True)
class TextMetric:
    """of(prediction, references) -> score, or with ``pool`` the numbers that are summed over items and then pooled by
    the function of that name in `jaxcl.metrics.pooling.POOLS`. ``needs``: further keyword arguments of ``of``."""

    name: str
    of: Callable[..., Any]
    convention: str
    papers: str = ""
    range: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool = True
    pool: str | None = None
    signature: str | None = None
    needs: tuple[str, ...] = ()
    card: str = CARD
    kind: str = "text"

    @property
    def lower_is_better(self) -> bool:
        return not self.higher_is_better


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise RequestError(f"references={references!r}; accepted: a list of at least one text")
    return references


def _best(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """The highest score over the references; 0 for an answer of white space."""

    def of(prediction: str, references: Sequence[str]) -> float:
        scores = [score(prediction, reference) for reference in _checked(references)]
        return float(max(scores)) if prediction.strip() else 0.0

    return of


def _same(rule: Callable[[str], str]) -> Callable[[str, Sequence[str]], float]:
    return _best(lambda prediction, reference: float(rule(prediction) == rule(reference)))


def _rouge(kind: str, words: str) -> Callable[[str, Sequence[str]], float]:
    return _best(functools.partial(rouge_f1, kind=kind, words=words))


def _statistics(name: str) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda prediction, references: translation.statistics(prediction, _checked(references), name=name)


def _f1_squad(prediction: str, reference: str) -> float:
    return overlap.overlap_f1(overlap.squad(prediction).split(), overlap.squad(reference).split(), bag=True)


def _f1_set(prediction: str, reference: str) -> float:
    return overlap.overlap_f1(prediction.split(), reference.split(), bag=False)


def _edit_similarity(prediction: str, reference: str) -> float:
    from rapidfuzz import fuzz

    return fuzz.ratio(overlap.restore_literals(prediction), overlap.restore_literals(reference)) / 100


def _number_match(prediction: str, reference: str) -> float:
    said, wanted = overlap.numbers(prediction), overlap.numbers(reference)
    if not wanted:
        raise RequestError(f"number_match of the reference {reference[:40]!r}; accepted: a text with a number")
    return float(bool(said) and said[-1] == wanted[-1])


def _sari(prediction: str, references: Sequence[str], *, source: str) -> float:
    return sari(source, prediction, _checked(references)).score if prediction.strip() else 0.0


_SACREBLEU = "sacrebleu's corpus score, 0 to 100, from n-gram counts summed over items; "
_ROWS = (
    TextMetric(name="exact_match_strict", of=_same(overlap.strict),
               convention="equal after white space at both ends is dropped", papers="TRACE (classification)"),
    TextMetric(name="exact_match_lenient", of=_same(overlap.lenient), papers="Natural Instructions, SuperNI, O-LoRA",
               convention="equal in lower case without ASCII punctuation and double spaces"),
    TextMetric(name="exact_match_squad", of=_same(overlap.squad), papers="SQuAD, MRQA, CMR, CKL",
               convention="as exact_match_lenient, and without the articles a, an, the"),
    TextMetric(name="f1_squad", of=_best(_f1_squad), papers="SQuAD, MRQA, CMR",
               convention="F1 of words after exact_match_squad's rule, each counted as often as both have it"),
    TextMetric(name="f1_set", of=_best(_f1_set), papers="GRACE (on token ids)", card="metrics/editing-metrics",
               convention="F1 of words split at white space, each common word counted once"),
    TextMetric(name="rougeL_f1_stem", of=_rouge("rougeL", "stem"), papers="SuperNI, CITB, O-LoRA, SAPT",
               convention="rouge-score's ROUGE-L F1, its tokenizer (a-z, 0-9 only) with Porter stems"),
    TextMetric(name="rouge1_f1_stem", of=_rouge("rouge1", "stem"), papers="SuperNI",
               convention="rouge-score's ROUGE-1 F1, its tokenizer (a-z, 0-9 only) with Porter stems"),
    TextMetric(name="rougeL_f1", of=_rouge("rougeL", "ascii"),
               convention="rouge-score's ROUGE-L F1, its tokenizer (a-z, 0-9 only), no stems"),
    TextMetric(name="rougeL_f1_unicode", of=_rouge("rougeL", "unicode"),
               convention="ROUGE-L F1 over words of any script, characters where a script has no spaces"),
    TextMetric(name="rougeL_trace", of=_best(rouge_l_trace), papers="TRACE",
               convention="F of the longest common subsequence with beta = P/R, words split at white space"),
    TextMetric(name="bleu", of=_statistics("bleu"), pool="bleu", range=(0.0, 100.0),
               papers="Papineni et al. 2002, Post 2018", convention=_SACREBLEU + "13a tokens, exponential smoothing",
               signature=translation.signature("bleu")),
    TextMetric(name="chrf", of=_statistics("chrf"), pool="chrf", range=(0.0, 100.0),
               papers="Popovic 2015, Post 2018", convention=_SACREBLEU + "up to 6 characters, beta 2",
               signature=translation.signature("chrf")),
    TextMetric(name="sari", of=_sari, papers="TRACE (20Minuten)", needs=("source",),
               convention="mean of keep F1, delete precision, add F1 over 1 to 4 words: Hugging Face's sari / 100"),
    TextMetric(name="edit_similarity", of=_best(_edit_similarity), papers="TRACE (Py150), CodeXGLUE",
               card="metrics/trace-citb-fuar", convention="rapidfuzz ratio / 100 after Py150's literals are restored"),
    TextMetric(name="number_match", of=_best(_number_match), papers="GSM8K", card="metrics/trace-citb-fuar",
               convention="the last number of the answer equals the last one of the reference"),
)  # fmt: skip
TEXT_METRICS: dict[str, TextMetric] = {m.name: m for m in _ROWS}
