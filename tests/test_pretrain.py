"""The pre-training experiment at its smallest: from data names to bits per byte, and again it is finished."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxcl import experiment_files
from jaxcl.cli import main
from jaxcl.registry import TABLES

SMALL = ("width=16", "layers=1", "window=16", "batch_size=4", "lr=0.02", "replay_ratio=0.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two languages of one word each: what is learned of one says nothing about the other."""
    place = tmp_path_factory.mktemp("data")
    for name, word in (("first", "abab"), ("second", "xyzz")):
        for split, n in (("train", 8), ("test", 3)):
            rows = [{"id": f"{split}-{i}", "text": word * (10 + i)} for i in range(n)]
            file = place / name / f"{split}.jsonl.gz"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return place


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("JAXCL_DATA", "")  # --data sets it for the process; this puts it back


def run(data: Path, out: Path, *settings: str) -> int:
    asked = [part for s in (*SMALL, "data=first,second", *settings) for part in ("--set", s)]
    return main(["run", "pretrain", "--data", str(data), "--out", str(out), *asked])


def test_a_small_run_learns_and_is_finished(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", "method=replay", "separate=true") == 0
    found = json.loads((tmp_path / "run" / "matrix.json").read_text())
    assert [(e["id"], e["metric"], e["n"], e["higher_is_better"]) for e in found["evals"]] == [
        ("first", "bits_per_byte", 3, False), ("second", "bits_per_byte", 3, False)
    ]  # fmt: skip
    assert [s["name"] for s in found["stages"]] == ["first", "second"]
    before, rows = np.array(found["row0"]), np.array(found["rows"])
    assert (before > 6).all() and rows[0, 0] < before[0] - 1 and rows[1, 1] < rows[0, 1] - 1
    assert run(data, tmp_path / "run", "method=replay", "separate=true") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data=first,secnd", "no data set 'secnd' in"),
        ("train=train[:0]", "'train[:0]' holds no rows; the split has 8"),
        ("test=train[5:]", "'train' and 'train[5:]' share rows of 'train'"),
        ("stream=text/domain", "unknown stream of text 'text/domain'; did you mean 'text/domains'"),
        ("data=tfds:imdb_revews", "no data set 'tfds:imdb_revews'; did you mean 'imdb_reviews'"),
    ],
)
def test_bad_names_are_one_line_and_leave_nothing(data, tmp_path, capsys, setting, words):
    assert run(data, tmp_path / "run", setting) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_it_is_listed_and_its_defaults_build():
    listed = {row["name"]: row["about"] for row in TABLES["experiments"].rows()}
    assert listed["pretrain"].startswith("Continual pre-training: a small byte decoder")
    module = experiment_files.load("pretrain")
    made = {name: module.methods(module.Config(method=name)) for name in ("sequential", "replay", "joint")}
    assert {name: [m.name for m in methods] for name, methods in made.items()} == {
        "sequential": ["finetune"], "replay": ["replay"], "joint": ["joint"]
    }  # fmt: skip
