"""Rows of the schemas with fields inside fields: what is accepted, what is refused, and all real files of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxcl.data.jsonl import read_rows
from jaxcl.errors import RequestError

TOKENS = ["Ada", "met", "Bob", "Li"]
GOOD = {
    "ner": {"task": "t", "id": "a", "tokens": TOKENS, "tags": ["B-per", "O", "B-per", "I-per"]},
    "re": {
        "task": "t", "id": "a", "relation": "met", "relation_id": 3, "tokens": TOKENS,
        "head": {"text": "Ada", "span": [0, 1], "id": "Q1"}, "tail": {"text": "Bob Li", "span": [2, 4]},
    },
    "translation": {"id": "a", "en": "a man", "de": "ein Mann", "fr": "un homme"},
    "tool": {
        "id": "a", "tools": [{"name": "add", "parameters": {}}],
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"role": "tool_result", "content": "2"},
            {"role": "assistant", "content": "2."},
        ],
    },
    "retrieval": {"id": "q", "query": "wings", "relevant": ["d1", "d2"], "grades": {"d1": 1}},
}  # fmt: skip
ALPACA = {
    "id": "b", "api": "Axolotl", "tools_description": "getFacts: ...", "instruction": "A fact, please.",
    "golden_calls": [{"Action": "getFacts", "Action_Input": "{}"}],
}  # fmt: skip
DOCUMENT = {"id": "d1", "title": "On wings", "text": "on wings .", "year": None}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_message(role, content):
    return {"messages": [*GOOD["tool"]["messages"], {"role": role, "content": content}]}


@pytest.mark.parametrize("schema", GOOD)
def test_good_rows_are_read_as_they_are(tmp_path, schema):
    more = {"tool": [ALPACA], "retrieval": [DOCUMENT]}.get(schema, [])
    rows = [GOOD[schema], *more]
    assert read_rows(write(tmp_path / "r.jsonl", *rows), schema) == rows


@pytest.mark.parametrize(
    ("schema", "change", "words"),
    [
        ("ner", {"tags": ["O"] * 3}, "field 'tags' has 3 entries for 4 tokens; accepted: one tag a token"),
        ("ner", {"tags": ["O", "I-per", "O", "O"]}, r"'tags'\[1\] is 'I-per' after 'O'; accepted: 'B-per'"),
        ("ner", {"tags": ["B-x", "I-y", "O", "O"]}, r"'tags'\[1\] is 'I-y' after 'B-x'; accepted: 'B-y'"),
        ("ner", {"tags": ["O", "O", "per", "O"]}, r"'tags'\[2\] is 'per'; accepted: 'O', 'B-type' or 'I-type'"),
        ("ner", {"tokens": []}, "field 'tokens' must be a list of strings, not empty"),
        ("ner", {"tokens": ["\ud800", "a", "b", "c"]}, "'tokens' holds half a surrogate pair"),
        ("re", {"head": "Ada"}, "field 'head' must be an object, found \"Ada\""),
        ("re", {"head": {"text": "Ada"}}, r"'head' has the span None; accepted: \[start, end\) within 4 tokens"),
        ("re", {"tail": {"text": "Bob", "span": [2, 5]}}, r"'tail' has the span \[2, 5\]"),
        ("re", {"tail": {"text": "Bob", "span": [2, True]}}, r"'tail' has the span \[2, True\]"),
        ("re", {"tail": {"span": [2, 3]}}, "'tail' has no 'text'"),
        ("re", {"relation_id": "3"}, "field 'relation_id' must be an integer"),
        ("re", {"tail": {"text": "\ud800", "span": [2, 3]}}, "'tail' holds half a surrogate pair"),
        ("translation", {"de": " "}, "field 'de' is empty"),
        ("translation", {"fr": None}, "field 'fr' must be a string, found null"),
        ("tool", {"messages": None}, "field 'api' is missing; accepted: tools and messages, or api, instruction"),
        ("tool", {"messages": []}, "field 'messages' is empty"),
        ("tool", {"tools": None}, "field 'tools' is missing"),
        ("tool", {"tools": [{"description": "x"}]}, r"'tools'\[0\] has no name"),
        ("tool", with_message("robot", "x"), r"'messages'\[4\] has the role 'robot'; accepted: user, assistant"),
        ("tool", with_message("user", 3), r"'messages'\[4\] has no content"),
        ("tool", with_message("tool_call", "add(1)"), r"'messages'\[4\] is no call; accepted: JSON text"),
        ("tool", with_message("tool_call", "[" * 99999), r"'messages'\[4\] is no call"),
        ("tool", with_message("tool_call", '{"name": "add", "arguments": "1"}'), r"'messages'\[4\] is no call"),
        ("tool", {**ALPACA, "messages": None, "golden_calls": [{"Action": "x"}]}, r"'golden_calls'\[0\] is no call"),
        ("retrieval", {"text": "both"}, "neither or both of 'text' and 'query'"),
        ("retrieval", {"query": None}, "neither or both of 'text' and 'query'"),
        ("retrieval", {"relevant": None}, "field 'relevant' is missing"),
        ("retrieval", {"relevant": []}, "field 'relevant' must be a list of strings, not empty"),
        ("retrieval", {"grades": {"d3": 1}}, "'grades' names 'd3', which is not in 'relevant'"),
        ("retrieval", {"grades": {"d1": "high"}}, r"'grades'\['d1'\] is 'high'; accepted: an integer"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, schema, change, words):
    path = write(tmp_path / "r.jsonl", GOOD[schema], {**GOOD[schema], "id": "bad", **change})
    with pytest.raises(RequestError, match=words) as caught:
        read_rows(path, schema)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


@pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="JAXCL_DATA names no benchmark data")
@pytest.mark.parametrize(
    ("schema", "files", "count"),
    [
        ("ner", "ner/*/*.jsonl.gz", 8586 + 3679 + 5007),
        ("re", "relation_extraction/fewrel/*.jsonl.gz", 1334 + 1672 + 4604 + 6000),
        ("translation", "translation/multi30k/*.jsonl.gz", 8000 + 1014 + 1000),
        ("tool", "tool_use/*/*.jsonl.gz", 240 + 60 + 100),
        ("retrieval", "retrieval/cranfield/*.jsonl.gz", 1398 + 180),
    ],
)
def test_all_real_rows_fit_their_schema(schema, files, count):
    folder = Path(os.environ["JAXCL_DATA"])
    assert sum(len(read_rows(path, schema)) for path in folder.glob(files)) == count
