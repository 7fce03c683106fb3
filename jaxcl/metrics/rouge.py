"""ROUGE through rouge-score, with the tokenizer of every name stated. Card metrics/rouge-ppl.

rouge-score's own tokenizer lowers the case and keeps a-z and 0-9 only: of Chinese nothing is left, of "Zürich" it
makes two words. That is the number that papers on English print, and it keeps its name; `Words` reads any script.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from jaxcl.metrics.overlap import f_measure, lcs_precision_recall

_ALONE = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_WORD = re.compile(rf"{_ALONE}|(?:(?!{_ALONE})[^\W_])+")


class Words:
    """Tokenizer for rouge-score: lower-cased runs of letters and digits of any script; characters of scripts that are
    written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) are a token each."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@functools.cache
def _scorer(kind: str, words: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = Words() if words == "unicode" else DefaultTokenizer(use_stemmer=words == "stem")
    return RougeScorer([kind], tokenizer=tokenizer)


def rouge_f1(prediction: str, reference: str, *, kind: str, words: str) -> float:
    """F1 of ``kind`` ('rouge1', 'rouge2', 'rougeL'), 0 to 1. words: 'ascii' (rouge-score's tokenizer), 'stem' (the same
    with Porter stems, as SuperNI sets it) or 'unicode' (`Words`)."""
    return float(_scorer(kind, words).score(reference, prediction)[kind].fmeasure)


def rouge_l_trace(prediction: str, reference: str) -> float:
    """F of the longest common subsequence with beta = P / R, as TRACE gets it from the PyPI package ``rouge``.
    Words are split at white space, case counts. The package also takes unions over sentences; this does not."""
    precision, recall = lcs_precision_recall(prediction.split(), reference.split())
    return f_measure(precision, recall, precision / recall) if recall else 0.0
