"""Leaks of a stream: test items that are trained on, and documents that come back under another stage's name.

Three kinds, each refused with the ids of the items unless it is allowed by name:

- ``test-in-train``: a test item stands in some stage's training rows; case, punctuation and white space do not count.
- ``near-duplicates``: a document is nearly one of another stage, or a test document nearly a training one.
- ``edit-prompts``: a paraphrase or locality prompt of an edit is itself trained on, read as ``test-in-train`` is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxcl.errors import RequestError, unknown

Texts = Mapping[str, Mapping[str, str]]
"""{stage or eval: {id: text}}."""
KINDS = ("test-in-train", "near-duplicates", "edit-prompts")
SHINGLE = 5
"""Words of a shingle; a shorter document is one shingle."""
PERMUTATIONS = 128
THRESHOLD = 0.8
"""Jaccard similarity of two documents' sets of shingles from which on they are near-duplicates."""
SEED = 1
"""Of the MinHash permutations: the same documents give the same pairs on every machine."""
_DROPPED = re.compile(r"[\W_]+")
_WORD = re.compile(r"\w+")


def check(
    train: Texts, test: Texts, *, near: bool = False, allow: Sequence[str] = (), kind: str = "test-in-train"
) -> dict[str, Any]:
    """Notes on leaks that are there and allowed: {kind: {'count': n, 'first': up to five of them, as words}}; {}: none.

    train: the training texts of every stage, replay pools included. test: those of every eval. near: also look for
    near-duplicates (`near_duplicates`; for documents, not for rows of one template). allow: kinds that are known and
    accepted. kind: what a test item that is trained on is called, ``edit-prompts`` where the test items are paraphrase
    and locality prompts. RequestError: a leak that is not allowed (its count, and the ids of the first five), an
    unknown kind.
    """
    for name in (kind, *allow):
        if name not in KINDS:
            raise unknown("leak", name, KINDS)
    found = {kind: repeated(train, test)}
    if near:
        found["near-duplicates"] = near_duplicates(train, test)
    notes = {}
    for name, pairs in found.items():
        if pairs and name not in allow:
            raise RequestError(f"leak {name!r}: {_told(pairs)}; drop them, or allow it by name: {name}")
        if pairs:
            notes[name] = {"count": len(pairs), "first": [_words(p) for p in pairs[:5]]}
    return notes


Pair = tuple[str, str, str, str]
"""(where, id, in, id) of two items that are, or are nearly, the same: the first is the test item or the later one."""


def repeated(train: Texts, test: Texts) -> list[Pair]:
    """Test items that stand in training, each with the first training row that has its text. A text of nothing but
    punctuation is compared as it stands. Linear in the characters of both."""
    wanted = {(name, i): plain(text) for name, rows in test.items() for i, text in rows.items()}
    at: dict[str, tuple[str, str]] = {}
    texts = set(wanted.values())
    for name, rows in train.items():
        for i, text in rows.items():
            if (key := plain(text)) in texts:
                at.setdefault(key, (name, i))
    return [(*where, *at[key]) for where, key in wanted.items() if key in at]


def unrepeated(
    rows: Iterable[dict[str, Any]],
    tests: Iterable[str],
    text: Callable[[dict[str, Any]], str],
    *,
    allow: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The training rows whose ``text`` is none of the test texts: what a stream drops where a benchmark leaks. All of
    them where ``allow`` names test-in-train."""
    held_out = set() if "test-in-train" in allow else {plain(t) for t in tests}
    return [row for row in rows if plain(text(row)) not in held_out]


def plain(text: str) -> str:
    """A text without case, punctuation and white space."""
    return _DROPPED.sub("", text.casefold()) or text.strip()


def near_duplicates(train: Texts, test: Texts | None = None) -> list[Pair]:
    """Pairs of documents of two stages, or of a test and a training document, whose sets of word 5-grams have a Jaccard
    similarity of at least 0.8 (Broder 1997; thresholds as in Lee et al. 2022, arXiv 2107.06499).

    Candidates come from MinHash with 128 permutations and locality-sensitive hashing; every candidate is then compared
    exactly, so all pairs are true, and one at the threshold may be missed. Documents of one stage, and test documents
    among themselves, are not compared. Thousands of documents take seconds.
    """
    from datasketch import MinHash, MinHashLSH

    places = [(kind, name, i, text) for kind, name, i, text in _placed(train, test or {})]
    shingles = [_shingles(text) for *_, text in places]
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    made = MinHash.generator((sorted(s) for s in shingles), num_perm=PERMUTATIONS, seed=SEED)
    pairs: list[Pair] = []
    for n, sketch in enumerate(made):
        kind, name, i, _ = places[n]
        for m in sorted(index.query(sketch)):
            other, its_name, its_id, _ = places[m]
            apart = (other, its_name) != (kind, name) and "train" in (kind, other)
            if apart and _jaccard(shingles[n], shingles[m]) >= THRESHOLD:
                pairs.append((name, i, its_name, its_id))
        index.insert(n, sketch)
    return pairs


def _placed(train: Texts, test: Texts) -> Iterator[tuple[str, str, str, str]]:
    """Training documents first, so that a pair names the test document before the training one."""
    for kind, groups in (("train", train), ("test", test)):
        for name, rows in groups.items():
            for i, text in rows.items():
                yield kind, name, i, text


def _shingles(text: str) -> frozenset[bytes]:
    words = _WORD.findall(text.casefold())
    last = max(len(words) - SHINGLE, 0)
    return frozenset(" ".join(words[at : at + SHINGLE]).encode() for at in range(last + 1))


def _jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    return len(a & b) / len(a | b)


def _told(pairs: Sequence[Pair]) -> str:
    more = ", ..." if len(pairs) > 5 else ""
    return f"{len(pairs)} found: " + ", ".join(map(_words, itertools.islice(pairs, 5))) + more


def _words(pair: Pair) -> str:
    where, one, other, its = pair
    return f"{one!r} of {where!r} is {its!r} of {other!r}"
