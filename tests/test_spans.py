"""Entities as text and back; strict span F1 against hand counts and against seqeval's rule written out in numpy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from byte_model import WIDTH, Bytes, make_view

from jaxcl.core.types import Clock
from jaxcl.data.jsonl import read_rows
from jaxcl.data.spans import Span, answer_of, counts, instruct_row, mentions_of, read_answer, spans_of
from jaxcl.errors import RequestError
from jaxcl.evaluate.answers import Answer, Answers
from jaxcl.evaluate.spans import span_f1
from jaxcl.metrics.pooling import pooled

TOKENS = ["Paris", "Hilton", "of", "New", "York", "saw", "Paris", ";", "then", "New", "York", "."]
TAGS = ["B-person", "I-person", "O", "B-city", "I-city", "O", "B-city", "O", "O", "B-team", "I-team", "O"]
ANSWER = "person: Paris Hilton; city: New York; city: Paris; team: New York"
TYPES = ("person", "city", "team")
ROW = {"task": "t", "id": "a", "tokens": TOKENS, "tags": TAGS}


def test_tags_to_text_and_back_by_hand():
    spans = [Span("person", 0, 2), Span("city", 3, 5), Span("city", 6, 7), Span("team", 9, 11)]
    assert spans_of(TAGS) == spans and spans_of(["O"]) == []
    assert spans_of(["B-a", "B-a", "I-a"]) == [Span("a", 0, 1), Span("a", 1, 3)]
    assert answer_of(TOKENS, spans) == ANSWER and answer_of(TOKENS, []) == "none"
    assert read_answer(ANSWER, TOKENS, TYPES) == spans
    row = instruct_row(ROW, "Entities?\n", types=("city",))
    assert row["target"] == "city: New York; city: Paris" and row["input"] == " ".join(TOKENS) and row["tags"] == TAGS


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("  PERSON :  Paris   Hilton ;city:New York", [("person", "Paris Hilton"), ("city", "New York")]),
        ("city: New York\nperson: Paris Hilton;", [("city", "New York"), ("person", "Paris Hilton")]),
        ("none", []), ("None.", []), ("", []), ("Paris Hilton", []), ("city:", []),
        ("city: ; city: x", [("city", "x")]),
        ("weapon: sword; city: Rome; god: Mars; team: b", [("city", "Rome"), ("team", "b")]),
        ("city: a ; b; team: c : d", [("city", "a ; b"), ("team", "c : d")]),
    ],
)  # fmt: skip
def test_reading_is_tolerant(answer, wanted):
    assert mentions_of(answer, TYPES) == wanted


def test_every_token_counts_once_from_left_to_right():
    two = read_answer("city: New York; city: New York; city: New York", TOKENS, TYPES)
    assert two == [Span("city", 3, 5), Span("city", 9, 11), Span("city", -1, 2)], "the third is nowhere left"
    assert read_answer("city: Paris; person: Paris Hilton", TOKENS, TYPES)[0] == Span("city", 0, 1)
    assert read_answer("city: NewYork; city: Oslo", TOKENS, TYPES) == [Span("city", 3, 5), Span("city", -1, 1)]
    wrong_type = read_answer("team: Paris Hilton", TOKENS, TYPES)
    assert counts(wrong_type, spans_of(TAGS), TYPES) == [0, 0, 1, 0, 0, 2, 0, 1, 1]
    assert mentions_of("city: x", ()) == []


def seqeval_counts(gold: list[str], said: list[str], types) -> np.ndarray:
    """seqeval's strict rule: the sets of (type, start, end) of both, read off the tags by its state machine."""

    def entities(tags):
        found, start = set(), None
        for i, tag in enumerate([*tags, "O"]):
            if start is not None and (tag == "O" or tag.startswith("B-") or tag[2:] != tags[i - 1][2:]):
                found.add((tags[i - 1][2:], start, i))
                start = None
            if tag.startswith("B-"):
                start = i
        return found

    a, b = entities(said), entities(gold)
    pairs = [((a & b), (a - b), (b - a))]
    return np.array([[sum(e[0] == t for e in part) for part in pairs[0]] for t in types])


def test_f1_equals_seqevals_rule_on_tags(view, monkeypatch):
    """Random tag sequences over distinct words: what the answer of one says of the other, micro and macro."""
    rng = np.random.default_rng(0)
    rows, said, total = [], [], np.zeros((3, 3))
    for i in range(30):
        words = [f"w{i}x{j}" for j in range(8)]
        pair = [random_tags(rng, 8) for _ in range(2)]
        if i % 3:
            pair[1][:4] = pair[0][:4]
            pair[1][4:] = ["O"] * 4
        rows.append(instruct_row({"task": "t", "id": str(i), "tokens": words, "tags": pair[0]}, "E?\n"))
        said.append(answer_of(words, spans_of(pair[1])))
        total += seqeval_counts(*pair, TYPES)
    micro, macro = evals(rows, monkeypatch, said)
    items = {e.pool: e.run(view, lambda *_: None) for e in (micro, macro)}
    tp, fp, fn = total.sum(axis=0)
    assert tp > 10 and fp > 10 and fn > 10
    assert pooled(items["f1_micro"], "f1_micro") == pytest.approx(2 * tp / (2 * tp + fp + fn))
    each = 2 * total[:, 0] / (2 * total[:, 0] + total[:, 1] + total[:, 2])
    assert pooled(items["f1_macro"], "f1_macro") == pytest.approx(each.mean()) and np.ptp(each) > 0.01
    assert (micro.id, micro.metric, macro.id) == ("t/f1_micro", "span_f1_micro", "t/f1_macro")


def random_tags(rng, n):
    tags: list[str] = []
    while len(tags) < n:
        if rng.random() < 0.5:
            kind = TYPES[rng.integers(3)]
            tags += [f"B-{kind}", *[f"I-{kind}"] * rng.integers(0, 3)]
        else:
            tags.append("O")
    return tags[:n]


@pytest.fixture(scope="module")
def view():
    return make_view()


def evals(rows, monkeypatch, said, **kw):
    monkeypatch.setattr(Answers, "__call__", lambda self, view, progress: [Answer(text, []) for text in said])
    return span_f1("t", rows, Bytes(), window=400, types=TYPES, **kw)


def test_only_types_seen_so_far_count(view, monkeypatch):
    """Gold entities of later types are left out, predictions of them ignored; the eval's own stage is the least."""
    seen = {0: ("person",), 1: ("person", "city"), 2: TYPES}
    said = "person: Paris Hilton; city: Paris; team: New York"
    parts = {}
    for own in (0, 1):
        micro, macro = evals([instruct_row(ROW, "E?\n")], monkeypatch, [said], types_at=seen.__getitem__, stage=own)
        for now in range(3):
            view.at(view.spec, view.params, {}, {}, Clock.at(stage=now))
            parts[own, now] = [e.run(view, lambda *_: None)[0]["parts"] for e in (micro, macro)]
    # "Paris" after "Paris Hilton" is read at its place; "New York" after it is the second one, which is the team
    assert parts[0, 0] == [[1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert parts[0, 1] == parts[1, 0] == [[2, 0, 1], [1, 0, 0, 1, 0, 1, 0, 0, 0]]
    assert parts[0, 2] == [[3, 0, 1], [1, 0, 0, 1, 0, 1, 1, 0, 0]]


def test_what_is_refused():
    row = instruct_row(ROW, "E?\n")
    with pytest.raises(RequestError, match="unknown entity type 'team' in row 'a' of eval 't'; accepted: city, person"):
        span_f1("t", [row], Bytes(), window=400, types=("person", "city"))
    with pytest.raises(RequestError, match="unknown mean of span F1 'micro'; did you mean"):
        span_f1("t", [row], Bytes(), window=400, types=TYPES, by=("micro",))
    with pytest.raises(RequestError, match="row 'a' has no tokens and tags"):
        span_f1("t", [{k: v for k, v in row.items() if k != "tags"}], Bytes(), window=400, types=TYPES)


def test_a_model_is_asked(view):
    (made,) = span_f1("t", [instruct_row(ROW, "E?\n")], Bytes(), window=WIDTH, types=TYPES, max_new=4, by=("f1_micro",))
    (item,) = made.run(view, lambda *_: None)
    assert made.id == "t" and item["parts"][2] == 4 and item["score"] == 0 and isinstance(item["prediction"], str)


@pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="JAXCL_DATA names no benchmark data")
def test_all_real_sentences_survive_the_way_to_text_and_back():
    """But for three in which the words of an entity stand before it unmarked, which no answer can tell."""
    sentences = entities = lost = 0
    for path in (Path(os.environ["JAXCL_DATA"]) / "ner").glob("*/*.jsonl.gz"):
        for row in read_rows(path, "ner"):
            spans = spans_of(row["tags"])
            types = {s.type for s in spans}
            said = read_answer(answer_of(row["tokens"], spans), row["tokens"], types)
            sentences, entities = sentences + 1, entities + len(spans)
            lost += said != spans
            assert len(said) == len(spans) and [s.type for s in said] == [s.type for s in spans]
    assert (sentences, entities, lost) == (17272, 47576, 3)


