"""Corpora in slices and dialogues in groups: what belongs where."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxcl.data.retrieval import asked_of, corpus, document_row, query_row, sliced
from jaxcl.data.tool_groups import GROUPS, PLAIN, glaive, group_of, held_out, toolalpaca
from jaxcl.errors import RequestError

needs_data = pytest.mark.skipif(not os.environ.get("JAXCL_DATA"), reason="JAXCL_DATA names no data directory")
DOCS = [{"id": str(n), "title": "t", "text": f"text {n}", "year": y} for n, y in
        enumerate(["1962", None, "1950", "1962", "1941", "1950", None])]  # fmt: skip
NAMES = ("slice_1", "slice_2", "slice_3")


def write(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def ids(slices: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    return [[row["id"] for row in rows] for rows in slices.values()]


def test_slices_cut_the_corpus_once():
    assert ids(sliced(DOCS, NAMES)) == [["0", "1"], ["2", "3"], ["4", "5", "6"]]
    assert ids(sliced(DOCS, NAMES, "year")) == [["1", "6"], ["4", "2"], ["5", "0", "3"]], "without a year comes first"
    with pytest.raises(RequestError, match="7 documents for 8 slices"):
        sliced(DOCS, [str(n) for n in range(8)])
    with pytest.raises(RequestError, match="unknown way to cut a corpus 'years'; did you mean 'year'"):
        sliced(DOCS, NAMES, "years")


def test_a_query_belongs_to_the_latest_slice_with_one_of_its_documents():
    queries = [
        {"id": "a", "query": "?", "relevant": ["0", "1"]},
        {"id": "b", "query": "?", "relevant": ["6", "0", "2"]},
        {"id": "c", "query": "?", "relevant": ["3", "99"]},
        {"id": "d", "query": "?", "relevant": ["98"]},
    ]
    asked, missing = asked_of(sliced(DOCS, NAMES), queries)
    assert ids(asked) == [["a"], ["c"], ["b"]] and missing == ["99", "98"]
    assert asked["slice_2"][0]["relevant"] == ["3"]
    turned = dict(reversed(sliced(DOCS, NAMES).items()))  # the order in which slices are learned decides
    assert {name: [q["id"] for q in rows] for name, rows in asked_of(turned, queries)[0].items()} == {
        "slice_3": [], "slice_2": ["c"], "slice_1": ["a", "b"]
    }  # fmt: skip


def test_documents_and_queries_as_rows():
    assert document_row(DOCS[0])["target"] == "0" and document_row(DOCS[0])["input"] == "text 0"
    made = query_row({"id": "q", "query": "what", "relevant": ["4", "2"]})
    assert (made["input"], made["target"], made["targets"], made["relevant"]) == ("what", "4", ["4", "2"], ["4", "2"])


def test_a_file_of_the_other_kind_is_refused(tmp_path):
    write(tmp_path, "retrieval/mine/docs.jsonl.gz", [{"id": "q", "query": "?", "relevant": ["1"]}])
    with pytest.raises(RequestError, match=r"mine/docs.jsonl.gz: row 'q' has no 'text'; accepted: docs"):
        corpus("mine", tmp_path)


@needs_data
@pytest.mark.parametrize("by", ["id", "year"])
def test_every_query_of_cranfield_is_in_one_slice_whose_documents_are_enough(by):
    docs, queries = corpus("cranfield")
    slices = sliced(docs, [f"slice_{n}" for n in range(1, 6)], by)
    assert sorted(i for part in ids(slices) for i in part) == sorted(d["id"] for d in docs)
    assert {len(rows) for rows in slices.values()} == {279, 280}
    asked, missing = asked_of(slices, queries)
    assert Counter(i for part in ids(asked) for i in part) == Counter(q["id"] for q in queries) and missing == ["995"]
    seen: set[str] = set()
    for part, of_slice in zip(ids(slices), asked.values()):
        assert all(set(q["relevant"]) & set(part) for q in of_slice)
        seen |= set(part)
        assert all(set(q["relevant"]) <= seen for q in of_slice)


def dialogue(i: str, *tools: str) -> dict[str, Any]:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return {"id": i, "tools": [{"name": name} for name in tools], "messages": said}


def test_a_dialogue_belongs_to_the_group_of_its_first_tool():
    first = [("calculate_tip", "search_books"), ("generate_qr",), ("get_news",), ("send_email",), ("fly_away",), ()]
    groups = [group_of(dialogue("x", *tools)) for tools in first]
    assert groups == ["calculate", "create", "look_up", "act", "act", PLAIN]
    verbs = [verb for verbs in GROUPS.values() for verb in verbs]
    assert len(set(verbs)) == len(verbs), "groups are disjoint"


def test_groups_cover_the_file(tmp_path):
    rows = [dialogue("a", "calculate_tip"), dialogue("b"), dialogue("c", "book_hotel"), dialogue("d", "find_park")]
    write(tmp_path, "tool_use/glaive_toolcall/train.jsonl.gz", rows)
    assert {k: [r["id"] for r in v] for k, v in glaive("train", tmp_path).items()} == {
        "calculate": ["a"], "create": [], "look_up": ["d"], "act": ["c"], PLAIN: ["b"]
    }  # fmt: skip
    write(tmp_path, "tool_use/glaive_toolcall/test.jsonl.gz", [rows[0], {"id": "x", "tools": []}])
    with pytest.raises(RequestError, match=r"glaive_toolcall/test.jsonl.gz:2: "):
        glaive("test", tmp_path)


def test_what_is_held_out_is_the_same_every_time_and_apart():
    rows = [{"id": str(n)} for n in range(10)]
    train, test = held_out(rows, "train"), held_out(rows, "test")
    assert len(test) == 4 and held_out(rows, "test") == test
    assert sorted(int(r["id"]) for r in train + test) == list(range(10))


@needs_data
def test_the_real_files_fill_every_group():
    for split in ("train", "test"):
        assert all(rows for rows in glaive(split).values())
    interfaces = toolalpaca()
    assert len(interfaces) == 10 and sum(map(len, interfaces.values())) == 100
    assert all(held_out(rows, "train") and held_out(rows, "test") for rows in interfaces.values())
