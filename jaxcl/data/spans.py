"""Named entities as text: BIO tags to an answer, ``type: surface; type: surface`` or ``none``, and back.

Reading is tolerant of order, case of types and white space. A surface stands for a span of tokens: the first free one
after the entity before it that reads the same (white space apart), else the first free one of the sentence; every token
counts once. An answer names no place, so an entity that a look-alike outside any entity precedes is read at the wrong
place: 3 of the 17,272 sentences of CrossNER, NCBI disease and BC5CDR as they lie in ``ner/``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NONE = "none"


class Span(NamedTuple):
    """An entity of a sentence: tokens[start:end]."""

    type: str
    start: int
    end: int


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The entities of BIO tags, in order."""
    starts = [i for i, tag in enumerate(tags) if tag.startswith("B-")]
    return [Span(tags[i][2:], i, _end(tags, i)) for i in starts]


def answer_of(tokens: Sequence[str], spans: Iterable[Span]) -> str:
    """What a model should write for the entities of a sentence, in order."""
    return "; ".join(f"{s.type}: {' '.join(tokens[s.start : s.end])}" for s in sorted(spans, key=_place)) or NONE


def mentions_of(answer: str, types: Collection[str]) -> list[tuple[str, str]]:
    """(type, surface) of every entity in a written answer; entries of other types are left out. A ';' inside a surface
    is part of it where no known type follows."""
    known = {" ".join(t.lower().split()): t for t in types}
    pattern = "|".join(r"\s+".join(map(re.escape, t.split())) for t in sorted(known, key=len, reverse=True))
    if not pattern:
        return []
    # an entry ends where another one begins: 'type:' after ';' or a new line, of whatever type
    entries = re.split(rf"(?:;|\n)\s*(?=(?:{pattern})\s*:|[^;:\n]*:\s)", answer, flags=re.IGNORECASE)
    found = []
    for entry in entries:
        name, colon, surface = entry.partition(":")
        kind = known.get(" ".join(name.lower().split()))
        if colon and kind is not None and surface.strip():
            found.append((kind, " ".join(surface.split()).rstrip(";").rstrip()))
    return found


def read_answer(answer: str, tokens: Sequence[str], types: Collection[str]) -> list[Span]:
    """The spans that an answer names; start is -1 for an entity that is nowhere (left) in the sentence."""
    found: list[Span] = []
    free, last = set(range(len(tokens))), 0
    for number, (kind, surface) in enumerate(mentions_of(answer, types)):
        places = [(a, b) for a, b in occurrences(tokens, surface) if free.issuperset(range(a, b))]
        places = [p for p in places if p[0] >= last] or places
        found.append(Span(kind, *places[0]) if places else Span(kind, -1, number))
        if places:
            free -= set(range(*places[0]))
            last = places[0][1]
    return found


def occurrences(tokens: Sequence[str], surface: str) -> list[tuple[int, int]]:
    """(start, end) of all runs of tokens that read as ``surface`` without white space, from left to right."""
    want, found = "".join(surface.split()), []
    for start in range(len(tokens)):
        text, end = "", start
        while end < len(tokens) and len(text) < len(want):
            text += "".join(tokens[end].split())
            end += 1
        if want and text == want:
            found.append((start, end))
    return found


def counts(said: Sequence[Span], wanted: Sequence[Span], types: Sequence[str]) -> list[float]:
    """True positives, false positives, false negatives, 3 numbers for each of ``types``. Strict: type and span must
    both be equal. Spans of other types do not count."""
    made, gold = set(said), set(wanted)
    parts = (made & gold, made - gold, gold - made)
    return [float(sum(s.type == t for s in part)) for t in types for part in parts]


def instruct_row(row: Mapping[str, Any], instruction: str, types: Collection[str] | None = None) -> dict[str, Any]:
    """A row of the ``ner`` schema as an ``instruct`` row, tokens and tags kept. types: those that are annotated (None:
    all); entities of others count as none."""
    spans = [s for s in spans_of(row["tags"]) if types is None or s.type in types]
    target = answer_of(row["tokens"], spans)
    return {**row, "instruction": instruction, "input": " ".join(row["tokens"]), "target": target}


def _end(tags: Sequence[str], start: int) -> int:
    return next((i for i in range(start + 1, len(tags)) if not tags[i].startswith("I-")), len(tags))


def _place(span: Span) -> tuple[int, int]:
    return span.start, span.end
