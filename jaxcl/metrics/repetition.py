"""rep-n: how much of a text repeats itself. Card cpt/aligned-llm-forgetting (Li and Lee 2024, arXiv 2401.03129)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Info, mean

ORDERS = (4, 8, 12, 16, 20)
INFO = tuple(
    Info(name=f"rep_{n}", kind="generation", card="cpt/aligned-llm-forgetting", papers="Li and Lee 2024",
         needs=("token ids of prompts with their continuations",), lower_is_better=True,
         convention=f"mean of 1 - distinct {n}-grams / {n}-grams of token ids, prompt included; 0 where shorter")
    for n in ORDERS
)  # fmt: skip


class Repetition(NamedTuple):
    """value: mean over sequences, 0 to below 1. short: how many had fewer than n tokens; they count as 0."""

    value: float
    short: int


def rep_n(ids: Sequence[Hashable], n: int) -> float:
    """1 - distinct n-grams / n-grams of one sequence; 0 where it is shorter than n."""
    if n < 1:
        raise RequestError(f"n={n} of rep-n; accepted: at least 1")
    total = len(ids) - n + 1
    return 1 - len({tuple(ids[i : i + n]) for i in range(total)}) / total if total > 0 else 0.0


def repetition(sequences: Sequence[Sequence[Hashable]], n: int) -> Repetition:
    """Over prompts with their continuations, as token ids: the number belongs to the tokenizer."""
    return Repetition(mean([rep_n(ids, n) for ids in sequences], "sequences"), sum(len(ids) < n for ids in sequences))
