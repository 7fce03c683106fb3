"""Leaks: exact ones in spite of case and punctuation, near-duplicates by a Jaccard similarity counted here."""

from __future__ import annotations

import random
import time

import pytest

from jaxcl.data.leaks import KINDS, SHINGLE, check, near_duplicates, plain, repeated, unrepeated
from jaxcl.errors import RequestError

TRAIN = {"a": {"a0": "The cat sat.", "a1": "A dog barked"}, "b": {"b0": "Rain falls on Spain"}}


def words(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(10**6)}" for _ in range(n)]


def jaccard(a: list[str], b: list[str]) -> float:
    """Of sets of word 5-grams, written out again."""
    one, two = ({tuple(x[i : i + SHINGLE]) for i in range(len(x) - SHINGLE + 1)} for x in (a, b))
    return len(one & two) / len(one | two)


def test_a_clean_stream_has_no_notes():
    assert check(TRAIN, {"t": {"t0": "The cat sat down."}}, near=True) == {}


@pytest.mark.parametrize("text", ["the CAT sat", " The  cat\nsat!", "The cat, sat.", "Thecatsat"])
def test_case_punctuation_and_white_space_do_not_hide_a_leak(text: str):
    with pytest.raises(RequestError, match=r"leak 'test-in-train': 1 found: 't0' of 't' is 'a0' of 'a'; drop"):
        check(TRAIN, {"t": {"t0": text, "t1": "something else"}})


def test_other_letters_and_digits_count():
    assert repeated({"a": {"x": "Blåbær 12"}}, {"t": {"y": "Blabær 12", "z": "Blåbær 13"}}) == []
    assert repeated({"a": {"x": "Blåbær 12"}}, {"t": {"y": "BLÅBÆR, 12"}}) == [("t", "y", "a", "x")]


def test_texts_of_punctuation_alone_are_compared_as_they_stand():
    assert repeated({"a": {"x": "???"}}, {"t": {"y": "!!!"}}) == []
    assert repeated({"a": {"x": "???"}}, {"t": {"y": " ??? "}}) == [("t", "y", "a", "x")]


def test_the_error_lists_five_ids_and_the_count():
    rows = {f"r{i}": f"text number {i}" for i in range(8)}
    with pytest.raises(RequestError) as error:
        check({"s": rows}, {"t": {f"t{i}": rows[f"r{i}"] for i in range(7)}})
    line = str(error.value)
    assert "7 found" in line and "\n" not in line and error.value.exit_code == 2
    assert all(f"'t{i}'" in line for i in range(5)) and "'t5'" not in line


def test_what_is_allowed_by_name_is_counted():
    notes = check(TRAIN, {"t": {"t0": "the cat sat", "t1": "a dog barked"}}, allow=("test-in-train",))
    assert notes["test-in-train"]["count"] == 2
    assert notes["test-in-train"]["first"] == ["'t0' of 't' is 'a0' of 'a'", "'t1' of 't' is 'a1' of 'a'"]


def test_edit_prompts_have_a_name_of_their_own():
    asked = {"generality": {"e0/0": "the cat sat"}}
    with pytest.raises(RequestError, match="leak 'edit-prompts'"):
        check(TRAIN, asked, kind="edit-prompts", allow=("test-in-train",))
    assert check(TRAIN, asked, kind="edit-prompts", allow=("edit-prompts",))["edit-prompts"]["count"] == 1


def test_unknown_kinds_are_refused_with_the_nearest():
    with pytest.raises(RequestError, match="unknown leak 'near-duplicate'; did you mean 'near-duplicates'"):
        check(TRAIN, {}, allow=("near-duplicate",))
    assert len(KINDS) == 3


def test_near_duplicates_are_those_of_other_stages_only():
    base = words(300, 0)
    close = [*base[:150], "changed", *base[151:]]
    far = base[:200] + words(100, 1)
    assert jaccard(base, close) > 0.9 and jaccard(base, far) < 0.6
    train = {
        "2000": {"x": " ".join(base), "same stage": " ".join(close)},
        "2001": {"y": " ".join(close).upper(), "z": " ".join(far)},
    }
    found = near_duplicates(train)
    assert found == [("2001", "y", "2000", "x"), ("2001", "y", "2000", "same stage")]
    with pytest.raises(RequestError, match=r"leak 'near-duplicates': 2 found: 'y' of '2001' is 'x' of '2000'"):
        check(train, {}, near=True)
    assert check(train, {}) == {}


def test_a_test_document_near_a_training_one_is_found_and_two_tests_are_not():
    base = words(200, 3)
    test = {"2000": {"t": " ".join(base[1:])}, "2001": {"u": " ".join(base[:-1])}}
    assert near_duplicates({}, test) == []
    assert near_duplicates({"2000": {"x": " ".join(base)}}, test) == [
        ("2000", "t", "2000", "x"), ("2001", "u", "2000", "x")
    ]  # fmt: skip


def test_the_threshold_is_exact_for_what_is_found():
    """Random documents that share a prefix: every pair that is reported has at least 0.8, none above 0.9 is missed."""
    base = words(200, 5)
    later = {str(n): base[:n] + words(200 - n, n) for n in range(140, 200, 3)}
    train = {"a": {"x": " ".join(base)}, "b": {k: " ".join(v) for k, v in later.items()}}
    found = {i for _, i, _, _ in near_duplicates(train)}
    alike = {k: jaccard(base, v) for k, v in later.items()}
    assert all(alike[k] >= 0.8 for k in found)
    assert found >= {k for k, v in alike.items() if v >= 0.9} != set()
    assert any(v < 0.8 for v in alike.values())


def test_the_same_documents_give_the_same_pairs():
    train = {s: {str(i): " ".join(words(60, i)[: 60 - j] + ["x"] * j) for i in range(20)} for j, s in enumerate("abcd")}
    assert near_duplicates(train) == near_duplicates(train) != []


def test_rows_that_repeat_a_test_row_are_dropped():
    rows = [{"id": "0", "q": "How?"}, {"id": "1", "q": "Why?"}]
    assert unrepeated(rows, ["WHY"], lambda row: row["q"]) == rows[:1]
    assert unrepeated(rows, ["WHY"], lambda row: row["q"], allow=("near-duplicates",)) == rows[:1]
    assert unrepeated(rows, ["WHY"], lambda row: row["q"], allow=("test-in-train",)) == rows


def test_fifty_thousand_rows_take_seconds():
    text = " ".join(words(60, 9))
    train = {"s": {str(i): f"{i} {text}" for i in range(50_000)}}
    started = time.process_time()
    assert len(repeated(train, {"t": {"t": f"7 {text}", "u": "no"}})) == 1
    assert time.process_time() - started < 10
    assert plain("A-b c!") == "abc"
