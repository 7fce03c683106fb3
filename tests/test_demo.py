"""The demo on its own text: what sequential training forgets, and what replay and joint training win back.

The margins were fixed before: sequential training ends at least `FORGETS` bits per byte above what it had learned,
replay and joint training win at least half of that back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcl import experiment_files
from jaxcl.core.progress import Reporter
from jaxcl.core.types import NOTHING
from jaxcl.errors import RequestError

FOLDER = experiment_files.packaged() / "demo"
SOME = ("sequential", "replay", "joint")
FORGETS = 0.3
HALF = 0.5


def load(name: str):
    """A file of the demo as `jaxcl demo` loads it."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"demo_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def main():
    return load("main")


@pytest.fixture(scope="module")
def text():
    return load("text")


def matrix(run: Path) -> np.ndarray:
    """f64[5, 4]: row 0, then a row a stage."""
    found = json.loads((run / "matrix.json").read_text())
    return np.array([found["row0"], *found["rows"]])


def rise(m: np.ndarray) -> float:
    """Mean over the first three stages of (loss at the end - loss right after the stage)."""
    return sum(m[4, i] - m[i + 1, i] for i in range(3)) / 3


def check(folder: Path) -> None:
    sequential = matrix(folder / "sequential")
    lost = rise(sequential)
    assert lost > FORGETS
    for i in range(4):  # every stage taught something that its test text shows
        assert sequential[i + 1, i] < sequential[i, i] - 0.05
    for name in ("replay", "joint"):
        left = (matrix(folder / name)[4, :3] - [sequential[i + 1, i] for i in range(3)]).mean()
        assert left < (1 - HALF) * lost, name


@pytest.fixture(scope="module")
def small(main):
    """The demo's own settings with a narrower model and half of the steps."""
    return dataclasses.replace(main.demo.Config(), width=96, base_steps=200, steps=24, test_rows=16)


@pytest.fixture(scope="module")
def finished(main, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main.main(str(out), small, SOME, quiet=True) == 0
    return out


def test_sequential_forgets_and_replay_and_joint_win_half_back(finished):
    check(finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whole_demo_on_three_seeds(main, tmp_path, seed):
    assert main.main(str(tmp_path), dataclasses.replace(main.demo.Config(), seed=seed), quiet=True) == 0
    check(tmp_path)
    assert {p.parent.name for p in tmp_path.glob("*/matrix.json")} == {"base", *main.demo.RUNS}


def test_again_it_is_finished_and_the_last_line_names_the_report(main, small, finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*/*.json")}
    assert main.main(str(finished), small, SOME) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert sum("is finished" in line for line in lines) == 4  # the base and three runs
    report = finished / "report.html"
    assert lines[-1] == f"report: {report}"
    assert report.read_text(encoding="utf-8").count('class="heat"') >= 3
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*/*.json")} == before


def test_another_config_is_refused_with_the_difference(main, small, finished):
    with pytest.raises(RequestError, match=r"config.lr is 0.001 there and 0.5 here"):
        main.main(str(finished), dataclasses.replace(small, lr=0.5), SOME, quiet=True)


def test_damaged_weights_of_the_base_are_refused(main, small, finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "base")
    file = tmp_path / "base" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RequestError, match="holds no weights"):
        main.main(str(tmp_path), small, SOME, quiet=True)
    assert not (tmp_path / "sequential").exists()


def test_the_steps_foretold_are_the_steps_made(main, small, finished):
    for name in SOME:
        made = json.loads((finished / name / "metrics.json").read_text())["accounting"]["steps"]
        assert main.demo.steps(small, name) == made


def test_every_method_builds_on_the_same_stages(main, small, finished):
    base = main.demo.base(small, finished / "base", Reporter(quiet=True))
    for name in main.demo.RUNS:
        experiment = main.demo.build(dataclasses.replace(small, method=name), base)
        experiment.check()
        assert [s.name for s in experiment.stages] == ["prose", "code", "names", "charsets"]
        assert {len(s.train) for s in experiment.stages} == {small.steps * small.batch_size}
        past = sum(m.keeps != NOTHING for m in experiment.methods)
        assert past == (name in ("replay", "olora_replay", "joint"))


def test_a_bare_run_keeps_its_base_in_the_cache(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path))
    cfg = dataclasses.replace(main.demo.Config(), width=16, layers=1, base_steps=1, steps=1)
    first = main.demo.build(cfg)
    (kept,) = tmp_path.glob("demo/*/weights.safetensors")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == first.source["sha256"]
    again = main.demo.build(dataclasses.replace(cfg, method="joint"))
    assert "is finished" in capsys.readouterr().out
    for path, value in first.params.items():
        np.testing.assert_array_equal(value, again.params[path])


def test_won_back_by_hand(main):
    sequential = np.array([[2.0, 9, 9], [3, 1, 9], [4, 4, 5]])  # forgot 2 and 3
    assert main.won_back(sequential, np.array([[2, 9, 9], [2, 1, 9], [2, 1, 5.0]])) == pytest.approx(1)
    assert main.won_back(sequential, np.array([[2, 9, 9], [2, 1, 9], [3, 3, 5.0]])) == pytest.approx(0.4)
    assert main.won_back(sequential, np.array([[9, 9, 9], [9, 9, 9], [5, 5, 0.0]])) == pytest.approx(-0.4)


def test_the_bar_counts_steps_over_all_runs(main):
    bar = main.Bar({"base": 10, "one": 30, "two": 60}, quiet=True)
    bar.part("one")
    assert bar.done == 10 and bar.left() == "compiling"
    bar.start("prose train", 30)
    for i in range(20):
        bar.update(i + 1, "loss 1.0")
    bar.start("after prose: names", 16)
    bar.update(16)
    assert bar.done == 30
    bar.began = time.monotonic() - 40  # 20 steps in 40 seconds, 70 to go
    assert bar.left() == "about 2:20 left"
    bar.part("two")
    assert bar.done == 40


def test_texts_are_dealt_whole_and_enough(main, text):
    cfg = main.demo.Config()
    for read in text.KINDS.values():
        documents = read()
        dealt = text.deal(documents)
        whole = sorted(d.strip()[: text.LONGEST] for d in documents.values() if d.strip())
        assert sorted([*dealt.base, *dealt.train, *dealt.test]) == whole
        assert text.deal(dict(reversed(documents.items()))) == dealt  # whatever the order they are found in
        rows = text.excerpts(dealt.train, cfg.window - 1, cfg.steps * cfg.batch_size)
        held_out = text.excerpts(dealt.test, cfg.window - 1, cfg.test_rows)
        assert len(set(held_out)) == cfg.test_rows
        assert not set(held_out) & set(rows)


def test_excerpts_by_hand(text):
    assert text.excerpts(["abcdefgh", "ijkl", "mn"], 3, 3) == ["abc", "def", "ijk"]
    assert text.excerpts(["abcdefgh", "ijkl"], 3, 2) == ["abc", "def"]
    assert text.excerpts(["\u20aca\u20ac\u20ac"], 3, 3) == ["\u20ac", "a", ""]  # a euro sign cut in two is left out
    with pytest.raises(RequestError, match="4 rows of 3 bytes are asked for; accepted: up to 3"):
        text.excerpts(["abcdefgh", "ijkl"], 3, 4)
