"""Reading rows, prompts, encoding and the O-LoRA streams; every bad file is one line that names the place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcl.data.encode import encode, encode_text, fit_prompt
from jaxcl.data.folder import folder_evals, folder_stages
from jaxcl.data.jsonl import MAX_LINE, data_folder, read_rows
from jaxcl.data.olora import olora_evals, olora_stages
from jaxcl.data.pipeline import pipeline
from jaxcl.data.stage import instruct_source, subsample, text_source
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.scenarios import STREAMS


class Bytes:
    """One token a byte; 256 ends a sequence."""

    eos_id, pad_id, vocab_size = 256, 0, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, messages):
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>"


GOOD = {
    "task": "t",
    "id": "a",
    "instruction": "Say.\n",
    "input": "x",
    "target": "yes",
    "labels": ["yes", "no"],
}


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read_as_they_are(tmp_path, name):
    other = GOOD | {
        "id": "b",
        "count": 3,
        "answer": "7",
        "targets": ["yes"],
        "own": {"kept": 1},
        "input": "ü世",
    }
    assert read_rows(write(tmp_path / name, GOOD, "", other)) == [GOOD, other]


def without(field):
    return {k: v for k, v in GOOD.items() if k != field}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"task": "t", ', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("[1, 2]", r"expected a JSON object, found \[1, 2\]"),
        (without("target"), "field 'target' is missing; did you mean 'targets'"),
        (GOOD | {"target": ""}, "field 'target' is empty"),
        (GOOD | {"input": 3}, "field 'input' must be a string, found 3"),
        (GOOD | {"labels": "yes"}, "field 'labels' must be a list of strings, not empty, found \"yes\""),
        (GOOD | {"labels": []}, "field 'labels' must be a list of strings, not empty"),
        (GOOD | {"count": True}, "field 'count' must be an integer, found true"),
        (GOOD | {"input": "\ud800"}, "field 'input' holds half a surrogate pair"),
        (GOOD, "id 'a' was already used in line 1"),
        ("x" * (MAX_LINE + 1), "the line is longer than 4 MiB"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    if isinstance(line, dict) and "target" not in line:
        line = line | {"targets": ["yes"]}
    path = write(tmp_path / "rows.jsonl.gz", GOOD, line)
    with pytest.raises(RequestError, match=words) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_damaged_and_missing_files(tmp_path, monkeypatch):
    whole = write(tmp_path / "a.jsonl.gz", *(GOOD | {"id": str(i), "input": os.urandom(40).hex()} for i in range(99)))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(RequestError, match=r"cut.jsonl.gz:\d+: the gzip stream is damaged or cut off"):
        read_rows(cut)
    cut.write_bytes(b"no gzip at all")
    with pytest.raises(RequestError, match=r"cut.jsonl.gz:1: the gzip stream is damaged"):
        read_rows(cut)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xe9"}\n')
    with pytest.raises(RequestError, match=r"latin.jsonl:2: not UTF-8 at byte 9"):
        read_rows(latin)
    with pytest.raises(RequestError, match=r"empty.jsonl: no rows"):
        read_rows(write(tmp_path / "empty.jsonl"))
    with pytest.raises(RequestError, match=r"no data file .*/b.jsonl; .* holds: a.jsonl.gz, cut.jsonl.gz"):
        read_rows(tmp_path / "b.jsonl")
    with pytest.raises(RequestError, match=r"no data file .*; the folder .* is absent too"):
        read_rows(tmp_path / "none" / "b.jsonl")
    with pytest.raises(RequestError, match="unknown schema 'instuct'; did you mean 'instruct'"):
        read_rows(whole, "instuct")
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(RequestError, match="--data or JAXCL_DATA must name the folder that holds olora_benchmark/"):
        data_folder("olora_benchmark")
    with pytest.raises(RequestError, match=r"no folder .*/olora_benchmark; --data or JAXCL_DATA"):
        data_folder("olora_benchmark", tmp_path)


def test_prompts_to_the_letter():
    row = GOOD | {"input": "Text: fine", "task": "sst", "category": "SC"}
    plain = "Say.\nOption: yes, no \nText: fine\nAnswer:"
    assert Template().prompt(row, Bytes()) == plain
    assert Template(prefix=True).prompt(row, Bytes()) == "Task:SC\nDataset:sst\n" + plain
    assert Template().prompt(without("labels"), Bytes()) == "Say.\nx\nAnswer:"
    # COPA: no instruction, the options are in the input
    assert Template().prompt(row | {"instruction": ""}, Bytes()) == "Text: fine\nAnswer:"
    assert Template("chat").prompt(row, Bytes()) == f"<user>{plain}</><assistant>"
    assert (Template().target("no"), Template("chat").target("no")) == (" no", "no")
    with pytest.raises(RequestError, match="unknown template 'chatt'; did you mean 'chat'"):
        Template("chatt")


def test_an_encoded_row_by_hand():
    got = encode([5, 6, 7], [8, 9], 7, 3, pad=1, row=4)
    expected = {
        "tokens": [5, 6, 7, 8, 9, 1, 1],
        "segments": [1, 1, 1, 1, 1, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 0],
        "targets_at": [3, 4, 0],
        "weight": [1, 1, 0],
        "row": 4,
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == (np.float32 if name == "weight" else np.int32)
    text = encode_text([5, 6, 7], 5)
    np.testing.assert_array_equal(text["weight"], [0, 1, 1, 0, 0])
    assert "targets_at" not in text
    for prompt, target, window, k in (([1] * 3, [2] * 3, 5, 3), ([1], [2] * 3, 5, 2), ([], [2], 5, 2)):
        with pytest.raises(RequestError, match="do not fit into a window of 5 tokens"):
            encode(prompt, target, window, k)


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("text", ["abcdefghij" * 9, "ü世界🌍" * 20])
def test_truncation_cuts_the_end_of_the_input_only(style, text):
    row, template = GOOD | {"input": text}, Template(style)
    frame = len(template.prompt(row | {"input": ""}, Bytes()).encode())
    for room in range(frame, frame + len(text.encode()) + 4, 7):
        ids = fit_prompt(row, template, Bytes(), room)
        assert len(ids) <= room
        most = 0  # characters of the longest beginning that fits
        while most < len(text) and len(text[: most + 1].encode()) <= room - frame:
            most += 1
        assert bytes(ids).decode() == template.prompt(row, Bytes(), text[:most])
    with pytest.raises(RequestError, match=f"row 'a': instruction, options and answer mark need {frame} tokens"):
        fit_prompt(row, template, Bytes(), frame - 1)


def test_the_answer_is_whole_in_every_row():
    rows = [GOOD | {"id": str(i), "input": "x" * i, "target": "yes" if i % 2 else "no"} for i in range(80)]
    source = instruct_source("s", rows, Bytes(), window=64)
    assert len(source) == 80 and source.label(3) == "yes" and source.id(3) == "3" and source.record(3) == rows[3]
    for i in range(80):
        one = source[i]
        answer = one["tokens"][one["targets_at"][one["weight"] > 0]]
        assert bytes(answer[:-1].tolist()).decode() == " " + rows[i]["target"] and answer[-1] == 256
        assert one["tokens"].shape == (64,) and one["weight"].shape == (5,) and one["row"] == i
        before = one["tokens"][: one["targets_at"][0]]
        assert bytes(before.tolist()).decode().endswith("\nAnswer:")


def test_what_does_not_fit_is_refused_before_training():
    long = GOOD | {"id": "long", "target": "y" * 70}
    with pytest.raises(RequestError, match=r"row 'long': its target has 72 tokens .*, at most 63 fit"):
        instruct_source("s", [GOOD, long], Bytes(), window=64)
    with pytest.raises(RequestError, match=r"row 'long': its target has 72 tokens .*, at most 5 fit"):
        instruct_source("s", [GOOD, long], Bytes(), window=256, k=5)
    wordy = GOOD | {"id": "wordy", "instruction": "Say it. " * 9}
    with pytest.raises(RequestError, match="row 'wordy': instruction, options and answer mark need"):
        instruct_source("s", [GOOD, wordy], Bytes(), window=64)
    with pytest.raises(RequestError, match="stage 's' has no training rows"):
        instruct_source("s", [], Bytes(), window=64)
    with pytest.raises(RequestError, match="stage 's': id 'a' occurs twice"):
        instruct_source("s", [GOOD, GOOD], Bytes(), window=64)


def test_text_blocks_hold_all_tokens_in_order():
    source = text_source("book", ["abcdefg", {"text": "hijk"}], Bytes(), window=5)
    tokens = np.concatenate([source[i]["tokens"][source[i]["segments"] > 0] for i in range(len(source))])
    assert tokens.tolist() == [*b"abcdefg", 256, *b"hijk", 256]
    assert [int(source[i]["weight"].sum()) for i in range(len(source))] == [4, 4, 2]
    assert source.label(0) == "book" and source.id(2) == "book-2"
    last = text_source("book", ["abcde"], Bytes(), window=5)[1]  # a lone end mark is kept; it predicts nothing
    assert last["tokens"][0] == 256 and last["segments"].sum() == 1 and not last["weight"].any()


def test_subsamples_are_seeded_and_keep_the_order():
    rows = [{"id": i} for i in range(50)]
    chosen = [r["id"] for r in subsample(rows, 20, 1)]
    assert chosen == sorted(set(chosen)) and len(chosen) == 20
    assert chosen == [r["id"] for r in subsample(rows, 20, 1)] != [r["id"] for r in subsample(rows, 20, 2)]
    assert subsample(rows, None, 0) == rows == subsample(rows, 99, 0)
    with pytest.raises(RequestError, match="rows=0"):
        subsample(rows, 0, 0)


@pytest.fixture
def benchmark_folder(tmp_path) -> Path:
    """A little benchmark of the shape of the real one; test and train rows can be told apart."""
    folder = tmp_path / "olora_benchmark"
    tasks = STREAMS["olora/order_1"].stages
    for n, task in enumerate(tasks):
        labels = [f"{task}{c}" for c in "abc"[: n % 2 + 2]]
        for split in ("train", "test"):
            rows = [
                {
                    "task": task,
                    "id": f"{task}-{split}-{i}",
                    "instruction": "Which?\n",
                    "input": f"{split} {i}",
                    "target": labels[i % len(labels)],
                    "labels": labels,
                }
                for i in range(6)
            ]
            write(folder / task / f"{split}.jsonl.gz", *rows)
    (folder / "tasks.json").write_text(json.dumps({task: {"category": "TC"} for task in tasks}))
    return tmp_path


def test_training_never_reaches_test_rows(benchmark_folder):
    for path in benchmark_folder.glob("*/*/test.jsonl.gz"):
        path.unlink()  # stages are made without them
    stages = olora_stages("olora/order_1", benchmark_folder, Bytes(), window=96)
    assert [s.name for s in stages] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert [s.evals for s in stages] == [(s.name,) for s in stages]
    from jaxcl.core.types import Stream

    sources = [s.train for s in stages]
    streams = tuple(Stream(i, np.arange(6)) for i in range(4))
    for batch in pipeline(sources, streams, stage=3, batch_size=4, steps=12, seed=0, epochs=1):
        for tokens, segments in zip(batch["tokens"], batch["segments"]):
            text = bytes(t for t in tokens[segments > 0].tolist() if t < 256).decode()
            assert "train" in text and "test" not in text
    assert len({s[0]["weight"].shape for s in sources}) == 1  # one shape over the stages
    with pytest.raises(RequestError, match=r"no data file .*dbpedia/test.jsonl.gz; .* holds: train.jsonl.gz"):
        olora_evals("olora/order_1", benchmark_folder, Bytes(), window=96)


def test_the_benchmark_refuses_what_is_not_there(benchmark_folder):
    def make(order="olora/order_1", **kw):
        return olora_stages(order, benchmark_folder, Bytes(), window=96, **kw)

    with pytest.raises(RequestError, match="unknown order 'olora/order1'; did you mean 'olora/order_1'"):
        make("olora/order1")
    assert len(make(rows=2)[0].train) == 2
    assert bytes(make(prefix=True)[0].train[0]["tokens"][:19].tolist()) == b"Task:TC\nDataset:dbp"
    with pytest.raises(RequestError, match="unknown kind of evaluation 'rank'"):
        olora_evals("olora/order_1", benchmark_folder, Bytes(), window=96, by="rank")
    path = benchmark_folder / "olora_benchmark" / "yahoo" / "train.jsonl.gz"
    write(path, GOOD, without("labels") | {"id": "b"})
    with pytest.raises(RequestError, match="yahoo: row 'b' of train has no labels"):
        make()
    write(path)
    with pytest.raises(RequestError, match=r"yahoo/train.jsonl.gz: no rows"):
        make()
    path.unlink()
    with pytest.raises(RequestError, match=r"no data file .*yahoo/train.jsonl.gz"):
        make()


def test_stages_and_evals_from_a_folder_of_ones_own(tmp_path):
    for name in ("one", "two"):
        row = GOOD | {"task": name}
        write(tmp_path / name / "train.jsonl", row, row | {"id": "b", "target": "no"})
        write(tmp_path / name / "test.jsonl.gz", row | {"id": "c"})
    stages = folder_stages(tmp_path, ["two", "one"], Bytes(), window=64)
    assert [(s.name, len(s.train), s.evals) for s in stages] == [("two", 2, ("two",)), ("one", 2, ("one",))]
    evals = folder_evals(tmp_path, ["two", "one"], Bytes(), window=64)
    assert [(e.id, e.metric, e.n) for e in evals] == [("two", "accuracy", 1), ("one", "accuracy", 1)]
    written = folder_evals(tmp_path, ["one"], Bytes(), window=64, by="generation")
    assert [(e.id, e.metric, e.n) for e in written] == [("one", "exact_match_strict", 1)]
    with pytest.raises(RequestError, match=r"no data file .*/three/train\.jsonl\.gz; the folder .* is absent"):
        folder_stages(tmp_path, ["one", "three"], Bytes(), window=64)
    with pytest.raises(RequestError, match=r"no data folder .*/none; it must hold <stage>/train\.jsonl"):
        folder_stages(tmp_path / "none", ["one"], Bytes(), window=64)


def test_streams_are_listed_without_jax():
    loaded = "'jax' in sys.modules, 'numpy' in sys.modules"
    code = f"import sys, jaxcl.scenarios as s; print(len(s.STREAMS) > 10, {loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


needs_data = pytest.mark.skipif(not os.environ.get("JAXCL_DATA"), reason="JAXCL_DATA names no data directory")


@needs_data
def test_orders_are_those_of_the_benchmark():
    orders = json.loads((data_folder("olora_benchmark") / "orders.json").read_text())
    assert {f"olora/{name}": tuple(o["tasks"]) for name, o in orders.items()} == {
        name: info.stages for name, info in STREAMS.items() if name.startswith("olora/")
    }


@needs_data
def test_the_real_benchmark_encodes_whole():
    folder = data_folder("olora_benchmark")
    tasks = json.loads((folder / "tasks.json").read_text())
    stages = olora_stages("olora/order_1", None, Bytes(), window=2048)
    assert {s.name: len(s.train) for s in stages} == {s.name: tasks[s.name]["train"] for s in stages}
    for stage in stages:
        row, one = stage.train.record(7), stage.train[7]
        text = bytes(t for t in one["tokens"][one["segments"] > 0].tolist() if t < 256).decode()
        prompt = (
            tasks[stage.name]["instruction"]
            + f"Option: {', '.join(tasks[stage.name]['labels'])} \n{row['input']}\nAnswer: {row['target']}"
        )
        assert text == prompt and len(prompt) < 2000
