"""Tool calls: questions made from dialogues, calls read from text, and their scores by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from byte_model import Bytes

from jaxcl.data.jsonl import read_rows
from jaxcl.data.tools import MAX_DEPTH, normalised, read_calls, turns, written
from jaxcl.errors import RequestError
from jaxcl.evaluate.answers import Answer, Answers
from jaxcl.evaluate.tools import SCORES, argument_counts, tool_calls
from jaxcl.metrics.pooling import pooled
from jaxcl.metrics.tools import Call

ADD = {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}
DIALOGUE = {
    "id": "d",
    "tools": [{"name": "add", "description": "adds"}],
    "messages": [
        {"role": "user", "content": "1+2?"},
        {"role": "tool_call", "content": json.dumps(ADD)},
        {"role": "tool_result", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Welcome."},
    ],
}
ALPACA = {
    "id": "x", "api": "A", "tools_description": "get: ...\n", "functions": ["components", "get"], "instruction": "Go.",
    "golden_calls": [{"Action": "[Optional]get", "Action_Input": '{"n": "7"}'}, {"Action": "y", "Action_Input": "{}"}],
}  # fmt: skip


def test_a_dialogue_has_a_question_for_each_turn_of_the_model():
    call, reply, last = turns(DIALOGUE, "glaive")
    assert [row["id"] for row in (call, reply, last)] == ["d/1", "d/3", "d/5"]
    assert call["input"] == "User: 1+2?" and call["calls"] == [ADD] and json.loads(call["target"]) == ADD
    assert call["instruction"].endswith('Tools:\n{"name": "add", "description": "adds"}\n') and call["tools"] == ["add"]
    assert reply["input"] == f"User: 1+2?\nCall: {json.dumps(ADD)}\nResult: 3" and reply["calls"] == []
    assert (reply["target"], last["target"]) == ("It is 3.", "Welcome.")
    assert turns(DIALOGUE, "glaive", history=2)[2]["input"] == "Assistant: It is 3.\nUser: Thanks."
    assert turns({**DIALOGUE, "tools": []}, "g")[0]["instruction"].endswith("Tools:\nnone\n")


def test_an_instruction_has_its_first_call():
    (row,) = turns(ALPACA, "alpaca")
    assert row["calls"] == [{"name": "get", "arguments": {"n": "7"}}] and row["tools"] == ["get"] and row["api"] == "A"
    assert json.loads(row["target"]) == row["calls"][0] and row["input"] == "User: Go."
    blank = {**ALPACA, "golden_calls": [{"Action": "get", "Action_Input": '{"n": ${n from y}}'}]}
    assert turns(blank, "alpaca")[0]["calls"] == [{"name": "get", "arguments": None}]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (written(ADD), [ADD]),
        ('I call {"name": "add", "arguments": {"a": 1}} and {"name":"b","arguments":{}}.',
         [{"name": "add", "arguments": {"a": 1}}, {"name": "b", "arguments": {}}]),
        ('[{"name": "add", "arguments": {}}]', [{"name": "add", "arguments": {}}]),
        ('{"name": "add", "description": "adds", "parameters": {"type": "object"}}', []),
        ('{"tool_calls": [{"name": "add", "arguments": "{\\"a\\": 1}"}]}', [{"name": "add", "arguments": {"a": 1}}]),
        ('{"name": "add", "arguments": {"name": "n", "arguments": {}}}',
         [{"name": "add", "arguments": {"name": "n", "arguments": {}}}]),
        ('{"name": "add", "arguments": {"a": NaN}}', []), ('{"name": "add", "arguments": {"a": 1}', []),
        ('{"name": "add"}', []), ('{"name": 3, "arguments": {}}', []), ("add(1, 2)", []), ("", []), ("{" * 9999, []),
        ('{"name": "x", "arguments": {"a": ' + "[" * 20000, []),
        ('{"name": "x", "arguments": {"a": ' + "9" * 9999 + "}}", []),
        ('{"name": "x", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}", []),
        ("__import__('os').system('echo')", []),
    ],
)  # fmt: skip
def test_calls_are_read_and_nothing_else(text, calls):
    assert read_calls(text) == [Call(c["name"], c["arguments"]) for c in calls]


def test_values_are_normalised():
    assert normalised({"a": " 7 ", "b": [" x ", "1.50", True], "c": {"d": "07"}}) == {
        "a": 7, "b": ["x", 1.5, True], "c": {"d": "07"}
    }  # fmt: skip
    assert normalised("true") == "true" and normalised("NaN") == "NaN" and normalised("") == ""


def test_argument_counts_by_hand():
    wanted = [Call("f", {"a": 1, "b": "x"})]
    assert argument_counts([Call("f", {"a": 1.0, "b": "y", "c": 2})], wanted) == [1, 2, 1]
    assert argument_counts([], wanted) == [0, 0, 2] and argument_counts(wanted * 2, wanted) == [2, 2, 0]
    assert argument_counts([Call("f", {"a": True})], wanted) == [0, 1, 2], "true is not 1"


def rows():
    found = turns(DIALOGUE, "g") + turns(ALPACA, "a")
    return [*found, {**found[1], "id": "plain", "answer": "three"}]


SAID = [
    '{"name": "add", "arguments": {"a": "1", "b": [2, " x"], "c": 0}}',
    "it is 3",
    '{"name": "add", "arguments": {}}',
    'Sure: {"name": "get", "arguments": {"n": 7}}',
    "Three.",
]


def test_scores_by_hand_from_one_pass(monkeypatch):
    passes = []

    def says(self, view, progress):
        passes.append(1)
        return [Answer(text, []) for text in SAID]

    class View:
        stamp, task = 0, None

    monkeypatch.setattr(Answers, "__call__", says)
    evals = {e.metric: e for e in tool_calls("t", rows(), Bytes(), window=900)}
    assert list(evals) == list(SCORES) and evals["over_trigger_rate"].id == "t/over_trigger_rate"
    items = {name: e.run(View(), lambda *_: None) for name, e in evals.items()}
    assert len(passes) == 1
    assert all(len(items[name]) == e.n for name, e in evals.items())
    scores = {name: [i["score"] for i in found] for name, found in items.items()}
    assert scores["tool_call_accuracy"] == [1, 1] and [i["id"] for i in items["tool_call_accuracy"]] == ["d/1", "x"]
    assert scores["tool_arguments_equal"] == scores["tool_argument_accuracy"] == [0, 1]
    assert [i["parts"] for i in items["tool_argument_f1"]] == [[2, 1, 0], [1, 0, 0]]
    assert pooled(items["tool_argument_f1"], evals["tool_argument_f1"].pool) == pytest.approx(6 / 7)
    assert scores["over_trigger_rate"] == [0, 1, 0] and not evals["over_trigger_rate"].higher_is_better
    assert scores["tool_reply_rougeL_f1"] == [1, 0, 0], "a call is no reply; 'Three.' has no word of 'It is 3.'"
    assert scores["tool_answer_accuracy"] == [1]


def test_what_is_refused():
    with pytest.raises(RequestError, match="unknown score of tool calls 'tool_accuracy'; did you mean"):
        tool_calls("t", rows(), Bytes(), window=900, by=("tool_accuracy",))
    with pytest.raises(RequestError, match="no row that tool_answer_accuracy is about"):
        tool_calls("t", rows()[:4], Bytes(), window=900, by=("tool_answer_accuracy",))
    with pytest.raises(RequestError, match="row 'd/1' does not say its calls"):
        tool_calls("t", [{k: v for k, v in rows()[0].items() if k != "calls"}], Bytes(), window=900)
    blank = turns({**ALPACA, "golden_calls": [{"Action": "get", "Action_Input": "${x}"}]}, "a")
    assert [e.metric for e in tool_calls("t", blank, Bytes(), window=900)] == ["tool_call_accuracy"]


@pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="JAXCL_DATA names no benchmark data")
def test_real_targets_are_read_back_as_their_calls():
    asks = replies = blanks = 0
    for path in (Path(os.environ["JAXCL_DATA"]) / "tool_use").glob("*/*.jsonl.gz"):
        for record in read_rows(path, "tool"):
            for row in turns(record, "t"):
                asks, replies = asks + bool(row["calls"]), replies + (not row["calls"])
                if row["calls"] and row["calls"][0]["arguments"] is None:
                    blanks += 1
                else:
                    assert read_calls(row["target"]) == [Call(c["name"], c["arguments"]) for c in row["calls"]]
    assert (asks, replies) == (211 + 100, 746) and 0 < blanks < 20
