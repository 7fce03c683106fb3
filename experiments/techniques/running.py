"""Runs of the tables, one process each, and steps of two experiments timed beside each other."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxcl.bench.running import Running
from jaxcl.bench.turns import in_turn, summary
from jaxcl.core.compiled import StepCache

STAGE = 2  # where steps are timed


def train_all(runs: dict[str, tuple[str, list[str], Path]], jobs: int) -> None:
    """{what a line says: (experiment, settings, run directory)}, those without metrics.json, ``jobs`` at a time. A run
    that fails says why, and the others go on."""
    left = {name: run for name, run in runs.items() if not (run[2] / "metrics.json").exists()}
    began = time.monotonic()

    def train_one(name: str) -> str:
        experiment, settings, path = left[name]
        sets = [f"--set={setting}" for setting in settings]
        words = [sys.executable, "-m", "jaxcl", "run", experiment, *sets, "--out", str(path)]
        done = subprocess.run(words, capture_output=True, text=True)
        return name + ("" if done.returncode == 0 else f": {done.stderr.strip()[-300:]}")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, future in enumerate(concurrent.futures.as_completed([pool.submit(train_one, r) for r in left]), 1):
            minutes = (time.monotonic() - began) / number * (len(left) - number) / 60
            print(f"{number}/{len(left)} {future.result()}; {minutes:.0f} min left", flush=True)


def size(count: float) -> str:
    """Bytes for a table."""
    for unit, each in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= each:
            return f"{count / each:.{2 if unit == 'MiB' else 0}f} {unit}"
    return f"{count:.0f} B" if count else "0"


def time_beside(
    build: Callable[[str], Any], base: str, row: str, file: Path, *, rounds: int, warm: int, steps: int
) -> None:
    """``file``: `jaxcl.bench.turns.summary` of ``rounds`` of ``steps`` steps of both, in turn, in the third stage. Not
    where it is there already, or no run has made its folder."""
    if file.exists() or not file.parent.is_dir():
        return
    sides = []
    for name in (base, row):
        exp = build(name)
        one = Running(exp, STAGE, StepCache(exp), steps * (rounds + warm + 1))
        sides.append(lambda one=one: [one() for _ in range(steps)])
    file.write_text(json.dumps(summary(in_turn(*sides, rounds, warm)), indent=1), encoding="utf-8")
