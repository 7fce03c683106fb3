"""The general-ability suite: contexts as the harness writes them, rows drawn evenly, what is absent refused."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter

import jax
import pytest
from test_ranking import Bytes

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.jsonl import read_rows
from jaxcl.errors import RequestError
from jaxcl.evaluate.general import FORMS, SUITE, Draw, choice_rows, general_suite, mmlu_rows
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny

ARC = {
    "task": "ARC-Easy",
    "id": "7",
    "instruction": "",
    "input": "Please choose the correct answer to the question: Why? Because?\n\nAnswer1: up Answer2: down we go "
    "Answer3: left\n\nAnswer format: answer1/answer2/answer3",
    "target": "answer2",
    "labels": ["answer1", "answer2", "answer3"],
}
PIQA = ARC | {
    "input": "Please choose the correct solution to the question: Fly.\n\nSolution1: Jump:\nhigh\n\nSolution2: Fall."
    "\n\nAnswer format: solution1/solution2",
    "target": "solution1",
    "labels": ["solution1", "solution2"],
}
BOOLQ = ARC | {
    "input": "Please answer the following question with true or false, question: is it so?\n\n"
    "Answer format: true/false",
    "target": "true",
    "labels": ["true", "false"],
}


def mcq(task: str, number: int) -> dict:
    choices = [f"c{number}{n}" for n in range(4)]
    return {"task": task, "id": f"{task}-{number}", "question": f"q{number} ", "choices": choices, "answer": number % 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every folder of the suite with a few rows of each set."""
    root = tmp_path_factory.mktemp("data")

    def write(path: str, rows: list[dict]) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))

    for name in FORMS:
        row = {"piqa": PIQA, "boolq": BOOLQ}.get(name, ARC)
        write(f"commonsense/{name}/test.jsonl.gz", [row | {"id": str(n)} for n in range(4)])
    for split in ("dev", "test"):
        write(f"mmlu/{split}.jsonl.gz", [mcq(task, n) for task in ("high_school_physics", "law") for n in range(5)])
    plain = {"instruction": "", "input": "1 + 1?", "target": "No"}
    for task in ("navigate", "word_sorting"):
        write(f"bbh/{task}.jsonl.gz", [plain | {"task": task, "id": f"{task}-{n}"} for n in range(3)])
    sums = plain | {"task": "gsm8k", "target": "so\n#### 2", "answer": "2"}
    write("math/gsm8k/test.jsonl.gz", [sums | {"id": str(n)} for n in range(3)])
    write("text_domains/wikipedia/test.jsonl.gz", [{"id": str(n), "text": "some words " * 9} for n in range(2)])
    return root


def test_contexts_are_those_of_the_harness():
    assert choice_rows("ARC-Easy", [ARC], "f") == [
        {"id": "7", "context": "Question: Why? Because?\nAnswer:", "choices": ["up", "down we go", "left"], "answer": 1}
    ]
    assert choice_rows("piqa", [PIQA], "f")[0]["choices"] == ["Jump:\nhigh", "Fall."]
    assert choice_rows("openbookqa", [ARC], "f")[0]["context"] == "Why? Because?"
    assert choice_rows("social_i_qa", [ARC], "f")[0]["context"] == "Q: Why? Because?\nA:"
    assert choice_rows("boolq", [BOOLQ], "f") == [
        {"id": "7", "context": "Question: is it so?\nAnswer:", "choices": ["no", "yes"], "answer": 1}
    ]


def test_mmlu_has_its_subjects_examples_as_many_as_fit():
    rows, dev = [mcq("high_school_physics", 9)], [mcq(t, n) for t in ("law", "high_school_physics") for n in range(5)]
    head = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    asked = "q9\nA. c90\nB. c91\nC. c92\nD. c93\nAnswer:"
    shot = "q{0}\nA. c{0}0\nB. c{0}1\nC. c{0}2\nD. c{0}3\nAnswer: {1}\n\n"
    (made,) = mmlu_rows(rows, dev, Bytes(), 2000, 2)
    assert made["context"] == head + shot.format(0, "A") + shot.format(1, "B") + asked
    assert (made["choices"], made["answer"]) == (["A", "B", "C", "D"], 1)
    assert mmlu_rows(rows, dev, Bytes(), 2000, 0)[0]["context"] == head + asked
    room = len(head + shot.format(1, "B") + asked) + 1
    assert mmlu_rows(rows, dev, Bytes(), room, 2)[0]["context"] == head + shot.format(1, "B") + asked
    assert mmlu_rows(rows, dev, Bytes(), room - 1, 2)[0]["context"] == head + asked


def test_rows_are_drawn_one_a_subject_in_turn():
    records = [mcq(task, n) for task in "abc" for n in range(4)] + [mcq("d", 0)]
    drawn = Draw(7, 3, 0).spread(records)
    assert sorted(Counter(r["task"] for r in drawn).values()) == [1, 2, 2, 2]
    assert [records.index(r) for r in drawn] == sorted(records.index(r) for r in drawn)
    assert drawn == Draw(7, 3, 0).spread(records) != Draw(7, 4, 0).spread(records)
    assert Draw(None, 3, 0).spread(records) == records


def test_the_whole_suite_runs(data):
    model = decoder(tiny(vocab=257, layers=1, width=16, heads=2, kv_heads=1, mlp=32, context=512))
    params = model.init(model.spec, jax.random.key(0))
    view = View(model).at(model.spec, params, {}, {}, Clock.at())
    made = general_suite(data, Bytes(), window=256, rows=2, batch_size=2)
    assert [e.id for e in made] == [f"general/{name}" for name in SUITE]
    assert all(e.role == "general" and e.n == 2 for e in made)
    assert {e.id[8:]: e.metric for e in made} == {
        "ARC-Challenge": "acc_norm", "ARC-Easy": "acc_norm", "boolq": "acc", "openbookqa": "acc_norm",
        "piqa": "acc_norm", "social_i_qa": "acc", "mmlu": "acc", "bbh": "exact_match_strict",
        "gsm8k": "number_match", "wikipedia": "perplexity",
    }  # fmt: skip
    for e in made:
        items = e.run(view, lambda done, total: None)
        assert len(items) == 2 and all(item["score"] >= 0 for item in items)


def test_what_the_suite_refuses(data, tmp_path):
    with pytest.raises(RequestError, match="unknown set of general ability 'mmul'; did you mean 'mmlu'"):
        general_suite(data, Bytes(), which=("mmul",))
    with pytest.raises(RequestError, match="shots=6; accepted: 0 to 5"):
        general_suite(data, Bytes(), which=("mmlu",), shots=6)
    with pytest.raises(RequestError, match=r"no folder .*mmlu; .*public source: github.com/hendrycks/test"):
        general_suite(tmp_path, Bytes(), which=("mmlu",))
    with pytest.raises(RequestError, match="f: row '7' does not list its answers"):
        choice_rows("ARC-Easy", [BOOLQ], "f")
    with pytest.raises(RequestError, match="f: row '7' asks no question that is answered with true or false"):
        choice_rows("boolq", [ARC], "f")


def test_every_row_of_the_data_can_be_read():
    root = os.environ.get("JAXCL_DATA")
    if not root:
        pytest.skip("JAXCL_DATA names no folder of data")
    for name in FORMS:
        records = read_rows(f"{root}/commonsense/{name}/test.jsonl.gz")
        rows = choice_rows(name, records, name)
        assert len(rows) == len(records) and all(len(r["choices"]) == len(x["labels"]) for r, x in zip(rows, records))
