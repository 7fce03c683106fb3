"""Instruction tuning and alignment as streams: made-up folders for the logic, real files where they are."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxcl.core.types import NOTHING, Budget
from jaxcl.data.instruction import general, question, superni, t0, trace
from jaxcl.data.leaks import repeated
from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS, Settings, open_stream
from jaxcl.scenarios.instruction import TRACE, UNSEEN

WORDS = ByteTokenizer()
needs_data = pytest.mark.skipif(not os.environ.get("JAXCL_DATA"), reason="JAXCL_DATA names no data directory")


def write(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def row(i: str, text: str, target: str, **more: Any) -> dict[str, Any]:
    return {"task": "t", "id": i, "instruction": "Say it.", "input": text, "target": target} | more


def made_superni(folder: Path, **train: list[dict[str, Any]]) -> Path:
    for name in (*STREAMS["superni/order_1"].stages, *UNSEEN):
        rows = train.get(name.partition("_")[0], [row(f"{name}-{n}", f"{name} {n}", f"word {n}") for n in range(8)])
        write(folder, f"superni/{name}/train.jsonl.gz", rows)
        write(folder, f"superni/{name}/test.jsonl.gz", [row(f"{name}-t", f"{name} test", "word")])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A made-up SuperNI that no test writes to."""
    return made_superni(tmp_path_factory.mktemp("superni"))


def test_superni_orders_are_permutations_of_one_set():
    one, two = (STREAMS[f"superni/order_{n}"].stages for n in (1, 2))
    assert set(one) == set(two) and one != two and len(one) == len(set(one)) == 15
    assert not set(UNSEEN) & set(one)


def test_the_definition_comes_before_the_input_and_labels_are_left_out(tmp_path):
    made_superni(tmp_path, task002=[row("a", "in", "out", labels=["out", "x"])])
    [one] = superni("task002_quoref_answer_generation", "train", tmp_path)
    assert question(one) == "Definition: Say it.\n\nInput: in" and "labels" not in one


def test_superni_teaches_rouge_and_asks_the_unseen_tasks_beside(folder):
    stream = open_stream("superni/order_1", WORDS, Settings(folder, window=128))
    assert [s.evals for s in stream.stages] == [(f"{s.name}/rougeL_f1_stem",) for s in stream.stages]
    by_role = {role: [e.id for e in stream.evals if e.role == role] for role in ("task", "probe")}
    assert len(by_role["task"]) == 15 and all("/rougeL" in i for i in by_role["task"])
    assert sum("exact_match" in i for i in by_role["probe"]) == 15
    assert [i for i in by_role["probe"] if i.startswith("unseen/")] == [f"unseen/{n}/rougeL_f1_stem" for n in UNSEEN]
    assert stream.keeps == Budget(examples=12) and not stream.notes, "a tenth of 120 rows"


def test_superni_keep_is_an_option_and_bounds_the_budget(folder):
    settings = {"data_dir": folder, "window": 128}
    assert open_stream("superni/order_2", WORDS, options={"keep": 0}, **settings).keeps == NOTHING
    assert open_stream("superni/order_2", WORDS, options={"keep": 0.5}, **settings).keeps == Budget(examples=60)
    for bad in (2, -0.1, "all", True):
        with pytest.raises(RequestError, match=r"option keep is .*; accepted: the share of all rows"):
            open_stream("superni/order_2", WORDS, options={"keep": bad}, **settings)
    with pytest.raises(RequestError, match="unknown option 'kept' in stream 'superni/order_2'; did you mean 'keep'"):
        open_stream("superni/order_2", WORDS, options={"kept": 1}, **settings)


def test_superni_orders_by_seed_and_by_likeness(folder):
    def names(**kw: Any) -> list[str]:
        return [s.name for s in open_stream("superni/order_1", WORDS, data_dir=folder, window=128, **kw).stages]

    given = list(STREAMS["superni/order_1"].stages)
    assert names() == given
    assert names(order="random", seed=1) == names(order="random", seed=1) != names(order="random", seed=2)
    assert sorted(names(order="similarity")) == sorted(given) and names(order="similarity")[0] == given[0]


def test_a_test_row_in_training_is_refused_by_id_and_allowed_by_name(tmp_path):
    name = "task002_quoref_answer_generation"
    made_superni(tmp_path, task002=[row("bad", f"{name} TEST!", "word"), row("good", "other", "word")])
    with pytest.raises(RequestError, match=rf"leak 'test-in-train': 1 found: '{name}-t' of '{name}' is 'bad' of"):
        open_stream("superni/order_1", WORDS, data_dir=tmp_path, window=128)
    stream = open_stream("superni/order_1", WORDS, data_dir=tmp_path, window=128, allow=("test-in-train",))
    assert stream.notes["leaks"]["test-in-train"]["count"] == 1


def test_long_answers_are_left_out_and_counted_never_cut(tmp_path):
    made_superni(tmp_path, task002=[row("long", "a", "y" * 300), row("short", "b", "y")])
    stream = open_stream("superni/order_1", WORDS, data_dir=tmp_path, window=128)
    [stage] = [s for s in stream.stages if s.name.startswith("task002")]
    assert [stage.train.id(i) for i in range(len(stage.train))] == ["short"]
    assert stream.notes == {"left out: answers longer than the window": {stage.name: 1}}


def test_malformed_rows_are_refused_with_file_and_line(tmp_path):
    made_superni(tmp_path)
    write(tmp_path, "superni/task1572_samsum_summary/train.jsonl.gz", [row("a", "x", "y"), {"task": "t", "id": "b"}])
    with pytest.raises(RequestError, match=r"task1572_samsum_summary/train.jsonl.gz:2: field 'instruction' is missing"):
        open_stream("superni/order_1", WORDS, data_dir=tmp_path, window=128)


def test_trace_repeats_rows_by_their_count_and_leaves_marks_to_the_template(tmp_path):
    rows = [row("a", "2+2\nAnswer:", "4", count=3), row("b", "立场\n态度：", "A"), row("c", "no mark", "x", count=1)]
    write(tmp_path, "trace/NumGLUE-cm/train.jsonl.gz", rows)
    once = trace("NumGLUE-cm", "train", tmp_path)
    assert [r["input"] for r in once] == ["2+2", "立场", "no mark"]
    again = trace("NumGLUE-cm", "train", tmp_path, repeat=True)
    assert [r["id"] for r in again] == ["a", "a#1", "a#2", "b", "c"] and len({r["input"] for r in again}) == 3


def test_t0_holds_a_quarter_out_and_drops_what_repeats_it(tmp_path):
    rows = [row(str(n), f"prompt {n % 30}", f"answer {n}<|endoftext|>") for n in range(40)]
    write(tmp_path, "t0_templates/mine.jsonl.gz", rows)
    train, test = (t0("mine", split, tmp_path) for split in ("train", "test"))
    assert len(test) == 10 and [r["id"] for r in test] == [r["id"] for r in t0("mine", "test", tmp_path)]
    assert not {r["input"] for r in train} & {r["input"] for r in test} and len(train) < 30
    assert {r["id"] for r in rows} - {r["id"] for r in train + test} == {
        r["id"] for r in rows if r["id"] not in {t["id"] for t in test} and r["input"] in {t["input"] for t in test}
    }
    assert all(r["target"] == f"answer {r['id']}" for r in train + test)


@needs_data
def test_real_instruction_sets_do_not_leak_over_their_tasks():
    for name, read in (("superni/order_1", superni), ("trace", trace), ("t0", t0)):
        parts = [{s: {r["id"]: question(r) for r in read(s, split)} for s in STREAMS[name].stages}
                 for split in ("train", "test")]  # fmt: skip
        assert repeated(*parts) == []
    assert len(general("self_instruct")) == 175


@needs_data
def test_trace_measures_each_task_by_its_own_metric_on_one_scale():
    stream = open_stream("trace", WORDS, Settings(window=1024, rows=4, test_rows=3))
    tasks = {e.id: e for e in stream.evals if e.role == "task"}
    assert {i: e.metric for i, e in tasks.items()} == TRACE and list(tasks) == [s.name for s in stream.stages]
    assert all(e.range == (0.0, 1.0) and e.higher_is_better for e in tasks.values())
    assert [e.id for e in stream.evals if e.role == "instruction"] == ["following/self_instruct", "following/lima"]


@needs_data
def test_code_is_continued_from_its_end():
    stream = open_stream("trace", WORDS, Settings(window=512, rows=8, test_rows=2))
    [py] = [s.train for s in stream.stages if s.name == "Py150"]
    whole = {r["id"]: r["input"].rstrip() for r in trace("Py150", "train")}
    for i in range(len(py)):
        example, record = py[i], py.record(i)
        text = WORDS.decode([int(t) for t in example["tokens"][: int(example["segments"].sum())]])
        assert whole[record["id"]].endswith(record["input"].rstrip()) and f"{record['input'][-20:]}" in text
