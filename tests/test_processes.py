"""One run over two processes on loopback, through gloo: killed, continued by one process and again by two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import read_log, relative
from test_resume import load

from jaxcl.core.checkpoint import Store
from jaxcl.core.lock import Lock

EXPERIMENT = Path(__file__).with_name("process_experiment.py")
TWO = {"fsdp": 2}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started(out: Path, processes: int, *settings: str, pause: str = "0.02", mesh: dict | None = None) -> list:
    """The run in so many processes of one device each."""
    env = os.environ | {
        "JAXCL_TEST_PAUSE": pause,
        "PYTHONPATH": os.pathsep.join([str(EXPERIMENT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "jaxcl", "run", str(EXPERIMENT), "--out", str(out), *settings]
    if processes > 1:
        command.append("--distributed")
        env |= {"JAXCL_COORDINATOR": f"127.0.0.1:{free_port()}", "JAXCL_PROCESS_COUNT": str(processes)}
        env["JAXCL_TEST_MESH"] = json.dumps(mesh or TWO)
    return [
        subprocess.Popen(
            command, env=env | ({"JAXCL_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def ended(children: list) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of each."""
    said = [child.communicate(timeout=600) for child in children]
    return [(child.returncode, *texts) for child, texts in zip(children, said, strict=True)]


def after_a_step_of(stage: int, out: Path, children: list) -> None:
    """Waits for a step's checkpoint of the stage."""
    folder, until = out / "checkpoints" / "stages" / f"{stage:03d}", time.monotonic() + 600
    while not list(folder.glob("*/step-*.manifest.json")):
        assert all(child.poll() is None for child in children), ended(children)
        assert time.monotonic() < until, "no checkpoint appeared"
        time.sleep(0.01)


def broken(out: Path, *settings: str) -> dict:
    """Two processes killed in the first stage, one stopped in the second, two stopped by a signal to one of them, and
    two that come to the end. What the ends were."""
    children = started(out, 2, *settings)
    after_a_step_of(0, out, children)
    for child in children:
        child.kill()
    found = {"killed": ended(children)}
    children = started(out, 1, *settings)
    after_a_step_of(1, out, children)
    children[0].send_signal(signal.SIGTERM)
    found["alone"] = ended(children)
    at = steps(out)
    children = started(out, 2, *settings)
    while steps(out) == at and all(child.poll() is None for child in children):
        time.sleep(0.01)
    children[1].send_signal(signal.SIGTERM)
    found["signal"] = ended(children)
    assert not (out / "metrics.json").exists(), "the signals came too late to test anything"
    found["end"] = ended(started(out, 2, *settings, pause="0"))
    return found


def steps(out: Path) -> list[str]:
    return [e for e in Store(out / "checkpoints").entries() if "step-" in e]


def compare(out: Path, whole: Path) -> None:
    """The same losses, weights, memories and measurements as of one process that was never stopped."""
    ours, theirs = read_log(out), read_log(whole)
    assert [(r["step"], r["stage"]) for r in ours] == [(r["step"], r["stage"]) for r in theirs]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-5)
    assert relative(load(out, "stages/001/done"), load(whole, "stages/001/done")) < 1e-5
    for name in ("row0", "rows"):
        mine, other = (json.loads((f / "matrix.json").read_text())[name] for f in (out, whole))
        np.testing.assert_allclose(mine, other, rtol=1e-5)
    names = sorted(f.name for f in (whole / "predictions").iterdir())
    assert names == sorted(f.name for f in (out / "predictions").iterdir()) and len(names) == 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("processes")
    whole = ended(started(folder / "whole", 1, pause="0"))
    assert whole[0][0] == 0, whole
    return folder / "whole", folder / "broken", broken(folder / "broken")


@pytest.mark.slow
def test_two_processes_killed_then_one_then_two_train_as_one_does(runs):
    whole, out, found = runs
    assert [status for status, _, _ in found["killed"]] == [-signal.SIGKILL] * 2
    assert found["alone"][0][0] == 75
    assert [status for status, _, _ in found["end"]] == [0, 0], found["end"]
    compare(out, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs):
    _, _, found = runs
    for status, _, error in found["signal"]:
        assert status == 75 and "stopped by SIGTERM; everything is saved" in error, found["signal"]


@pytest.mark.slow
def test_only_the_first_process_speaks_and_writes(runs):
    _, out, found = runs
    (_, first, _), (_, second, _) = found["end"]
    own = [line for line in second.splitlines() if not line.startswith("[Gloo]")]  # which speaks for itself
    assert "done:" in first and "continuing after stages/001/" in first and own == []
    assert len(list((out / "events").iterdir())) == 4, "one file of events for each start, of one process each"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "JAXCL_COORDINATOR without JAXCL_PROCESS_COUNT, JAXCL_PROCESS_ID"),
        ({"JAXCL_PROCESS_COUNT": "two", "JAXCL_PROCESS_ID": "0"}, "JAXCL_PROCESS_COUNT=two"),
    ],
)
def test_half_an_address_is_refused(env, said):
    command = [sys.executable, "-m", "jaxcl", "run", str(EXPERIMENT), "--distributed"]
    env = os.environ | {"JAXCL_COORDINATOR": "127.0.0.1:1"} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_one_process_refuses_ends_all(tmp_path):
    held = Lock(tmp_path)
    held.take()
    ends = ended(started(tmp_path, 2))
    held.release()
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert "another process is at work there" in ends[0][2] and "another process of this run was refused" in ends[1][2]
