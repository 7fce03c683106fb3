"""Weights & Biases beside the events, with a module that only takes notes in its place."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from support import Answers, experiment

from jaxcl.cli import main
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.tracking import follow
from jaxcl.data.stage import Stage
from jaxcl.errors import Interrupted, RequestError
from jaxcl.evaluate.base import Eval


class Notes:
    """The part of wandb that we call."""

    def __init__(self):
        self.inits, self.axes, self.rows, self.finished = [], [], [], 0

    def init(self, **kw):
        self.inits.append(kw)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


@pytest.fixture
def notes(monkeypatch):
    fake = Notes()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def build(**kw):
    score = Eval("e", "accuracy", 2, lambda view, progress: [{"id": k, "prediction": "", "score": 0.5} for k in "ab"])
    stages = [Stage(f"s{i}", Answers(f"s{i}", seed=i), evals=("e",) if i == 0 else ()) for i in range(2)]
    return experiment([], stages=stages, evals=[score], **kw)


def test_wandb_gets_what_the_events_get(notes, tmp_path):
    train(build(), tmp_path / "run", config={"lr": 1}, reporter=Reporter(quiet=True), follow=follow("mine"))
    (start,) = notes.inits
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert start["project"] == "mine" and start["config"] == config and start["dir"] == str(tmp_path / "run")
    assert "mode" not in start  # the environment decides
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    floats = [{f"train/{k}": v for k, v in r.items() if isinstance(v, float)} for r in log]
    trained = [r for r in notes.rows if "train/step" in r]
    assert trained == [row | {"train/step": r["step"]} for row, r in zip(floats, log)] and len(log) == 4
    assert [r for r in notes.rows if "eval/stages" in r] == [{"eval/e": 0.5, "eval/stages": t} for t in range(3)]
    assert ("train/*", "train/step") in notes.axes and ("eval/*", "eval/stages") in notes.axes
    assert notes.finished == 1


def test_a_run_that_continues_is_the_same_wandb_run(notes, tmp_path, monkeypatch):
    def stop_at_first(row):
        notes.rows.append(row)
        if row.get("train/step") == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(notes, "log", stop_at_first)
    with pytest.raises(Interrupted):
        train(build(), tmp_path / "run", reporter=Reporter(quiet=True), follow=follow("mine"))
    monkeypatch.delattr(notes, "log")
    train(build(), tmp_path / "run", reporter=Reporter(quiet=True), follow=follow("mine"))
    first, second = notes.inits
    assert first["id"] == second["id"] and second["resume"] == "allow" and notes.finished == 2
    assert sorted(r["train/step"] for r in notes.rows if "train/step" in r) == [0, 1, 2, 3]
    train(build(), tmp_path / "run", reporter=Reporter(quiet=True), follow=follow("mine"))
    assert len(notes.inits) == 2  # finished: nothing to tell


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(**_):
        raise ValueError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(RequestError, match=r"api_key not configured .*WANDB_MODE=offline"):
        train(build(), tmp_path / "run", reporter=Reporter(quiet=True), follow=follow("mine"))


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["run", "demo", "--out", str(tmp_path / "run"), "--wandb"]) == 2
    assert "pip install 'jaxcl[tracking]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "project"), [([], None), (["--wandb"], "jaxcl"), (["--wandb", "mine"], "mine")])
def test_the_flag_names_the_project(monkeypatch, tmp_path, flags, project):
    seen = []
    monkeypatch.setattr("jaxcl.core.run.opened", lambda *_: (None, tmp_path, "demo", {}))
    monkeypatch.setattr("jaxcl.core.run.train", lambda *_, follow, **__: seen.append(follow))
    monkeypatch.setattr("jaxcl.core.tracking.follow", lambda name: name)
    assert main(["run", "demo", *flags]) == 0 and seen == [project]
