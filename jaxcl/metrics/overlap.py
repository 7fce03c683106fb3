"""How much of an answer is in another: exact match, token F1, longest common subsequence. Card metrics/rouge-ppl."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from decimal import Decimal

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def strict(text: str) -> str:
    """White space at both ends is dropped; case and punctuation count."""
    return text.strip()


def lenient(text: str) -> str:
    """Lower case, ASCII punctuation removed, white space collapsed (Natural Instructions)."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def squad(text: str) -> str:
    """As `lenient`, and the articles a, an, the are dropped (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f_measure(precision: float, recall: float, beta: float = 1.0) -> float:
    """(1 + beta^2) P R / (R + beta^2 P), 0 where both are 0."""
    below = recall + beta**2 * precision
    return (1 + beta**2) * precision * recall / below if below else 0.0


def overlap_f1(prediction: Sequence[Hashable], reference: Sequence[Hashable], *, bag: bool) -> float:
    """F1 of the tokens in common. bag: a token counts as often as both have it (SQuAD); otherwise once, while
    the lengths still count every token (GRACE)."""
    if not prediction or not reference:
        return 0.0
    common = Counter(prediction) & Counter(reference)
    n = common.total() if bag else len(common)
    return f_measure(n / len(prediction), n / len(reference))


def lcs_precision_recall(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> tuple[float, float]:
    """(l / len(prediction), l / len(reference)), l the length of the longest common subsequence (Lin 2004);
    0 where either is empty."""
    from rapidfuzz.distance import LCSseq

    if not prediction or not reference:
        return 0.0, 0.0
    common = LCSseq.similarity(prediction, reference)
    return common / len(prediction), common / len(reference)


def numbers(text: str) -> list[Decimal]:
    """The numbers written in a text: ASCII digits with commas between thousands, a sign, a decimal point."""
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)]


def restore_literals(code: str) -> str:
    """Py150's placeholders replaced by what they stand for: ``<STR_LIT:x>`` is x, ``<NUM_LIT>`` is 0, ``<STR_LIT>``
    and ``<CHAR_LIT>`` are nothing (CodeXGLUE, which TRACE follows)."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)
