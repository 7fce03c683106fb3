"""Runs as processes of their own, that are stopped from outside, and what they leave: shared by the tests of faults."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from support import Answers, digest, weights

from jaxcl.cli import main
from jaxcl.core import journal
from jaxcl.core.checkpoint import Store
from jaxcl.data.encode import Example
from jaxcl.data.pipeline import batches
from jaxcl.evaluate.base import Eval

HERE = Path(__file__).parent
SINGLE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
PATIENCE = 180  # seconds until a child that does nothing is given up


class Slow(Answers):
    """Reads a row in the time that the environment says, so that a signal from outside finds the run awake."""

    def __getitem__(self, i: int) -> Example:
        time.sleep(float(os.environ.get("JAXCL_TEST_PAUSE", "0")))
        return super().__getitem__(i)


def held_out(apply, head, spec, params, batch):
    return apply(spec, params, batch).nll


def evaluate(view, progress) -> list[dict]:
    source, items = Answers("held out", 8, seed=99), []
    for batch in batches(source, None, 8):
        nll = np.asarray(view.call(held_out, {k: v for k, v in batch.items() if k != "row"}))
        items += [{"id": source.id(i), "prediction": None, "score": float(x.sum())} for i, x in enumerate(nll)]
    progress(8, 8)
    return items


def nll(run: Callable = evaluate) -> Eval:
    """The eval of these runs: the loss of eight rows that no stage has."""
    return Eval("nll", "nll", 8, run, higher_is_better=False, range=(0.0, float("inf")))


def here(experiment: Path, out: Path, *settings: str) -> int:
    """The run in this process; its exit status."""
    return main(["run", str(experiment), "--out", str(out), *settings])


def outside(experiment: Path, out: Path, *settings: str, pause: float = 0.02, **kw: Any) -> subprocess.Popen:
    """The run in a process of its own, slow enough to be met in the middle of a stage."""
    env = os.environ | {"JAXCL_TEST_PAUSE": str(pause), "PYTHONPATH": path_of(HERE)} | kw.pop("env", {})
    command = [sys.executable, "-m", "jaxcl", "run", str(experiment), "--out", str(out), *settings]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kw)


def path_of(*first: Path) -> str:
    """A PYTHONPATH of these folders and of what this process was given."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def wait_for(child: subprocess.Popen, found: Callable[[], Any]) -> Any:
    """What ``found`` returns as soon as that is true; fails when the child has ended before."""
    until = time.monotonic() + PATIENCE
    while not (value := found()):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until, "no checkpoint appeared"
        time.sleep(0.002)
    return value


def stop(child: subprocess.Popen, out: Path, stage: int, number: int) -> tuple[int, str]:
    """Sends a signal once the stage has a step checkpoint; (exit status, standard error)."""
    folder = out / "checkpoints" / "stages" / f"{stage:03d}"
    wait_for(child, lambda: list(folder.glob("*/step-*.manifest.json")))
    return end(child, out, number)


def end(child: subprocess.Popen, out: Path, number: int) -> tuple[int, str]:
    """Sends a signal now; (exit status, standard error)."""
    child.send_signal(number)
    error = child.communicate(timeout=120)[1]
    assert not (out / "metrics.json").exists(), "the signal came too late to test anything"
    return child.returncode, error


def kill_at_random(child: subprocess.Popen, out: Path, stage: int, rng: random.Random, in_save: bool) -> bool:
    """Kills a child with -9 at a moment of its own work in ``stage`` or later: some time after its first commit there,
    or, ``in_save``, when the next save has begun and is not committed. True where the kill met a save under way."""
    root = out / "checkpoints" / "stages"
    before = _commits(root, stage)
    wait_for(child, lambda: _commits(root, stage) - before)
    time.sleep(rng.uniform(0, 0.4))
    if in_save:
        wait_for(child, lambda: _saving(root))
        time.sleep(rng.uniform(0, 0.01))
    status, error = end(child, out, signal.SIGKILL)
    assert status == -signal.SIGKILL, error
    return bool(_saving(root))


def _commits(root: Path, stage: int) -> set[str]:
    found = (f for f in _walk(root) if f.name.endswith(".manifest.json"))
    return {str(f) for f in found if int(f.relative_to(root).parts[0]) >= stage}


def _saving(root: Path) -> list[Path]:
    return [f for f in _walk(root) if ".orbax-checkpoint-tmp" in f.name]


def _walk(root: Path) -> list[Path]:
    """Everything under a folder that another process changes meanwhile (rglob would stumble over what goes)."""
    return [Path(at, name) for at, folders, names in os.walk(root) for name in (*folders, *names)]


def store(out: Path) -> Store:
    return Store(out / "checkpoints")


def load(out: Path, entry: str, source: dict | None = None) -> dict[str, np.ndarray]:
    source = journal.flatten(weights() if source is None else source, "params")
    arrays = store(out).load(entry, lambda *_: SINGLE, source)
    return {k: np.asarray(v) for k, v in arrays.items()}


def final(out: Path, stages: int = 2) -> tuple[str, bytes, str]:
    """Hash of all weights and memories after the last stage, the log's bytes, the matrix."""
    last = digest(load(out, journal.entry_name(stages - 1)))
    return last, (out / "log.jsonl").read_bytes(), (out / "matrix.json").read_text()


def steps(out: Path) -> list[str]:
    """Step checkpoints, the newest last."""
    return [e for e in store(out).entries() if journal.position(e).kind == "step"]


def files(folder: Path) -> list[Path]:
    """Its files that hold anything, at any depth."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)


def contents(folder: Path, but: Iterable[str] = ()) -> dict[str, bytes]:
    """{path inside: bytes} of all files of a folder, ``but`` for these top folders."""
    inside = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    return {k: f.read_bytes() for k, f in inside.items() if k.split(os.sep)[0] not in set(but)}
