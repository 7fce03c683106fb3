"""Sentences in several languages as questions with answers: one direction of translation at a time.

Multi30k (Elliott et al. 2016, arXiv 1605.00459): ``translation/multi30k/{train,test}.jsonl.gz`` in the data directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcl.errors import RequestError

LANGUAGES = {"en": "English", "de": "German", "fr": "French"}
Row = dict[str, Any]


def directed(rows: Sequence[Row], direction: str) -> list[Row]:
    """``translation`` rows as ``instruct`` rows of a direction such as 'en-de'; ids stay. RequestError: another one."""
    source, _, target = direction.partition("-")
    if source not in LANGUAGES or target not in LANGUAGES or source == target:
        raise RequestError(f"direction {direction!r}; accepted: two of {', '.join(LANGUAGES)}, as in 'en-de'")
    question = f"Translate from {LANGUAGES[source]} to {LANGUAGES[target]}.\n"
    return [
        {"task": direction, "id": row["id"], "instruction": question, "input": row[source], "target": row[target]}
        for row in rows
    ]
