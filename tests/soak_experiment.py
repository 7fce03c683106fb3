"""Any number of short stages under five methods at once; run by test_soak.py in processes that are killed."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from pathlib import Path

import optax
from killed import Slow, evaluate, nll
from support import experiment

from jaxcl.core.experiment import Experiment
from jaxcl.data.stage import Stage
from jaxcl.methods.agem import agem
from jaxcl.methods.ewc import ewc
from jaxcl.methods.lwf import lwf
from jaxcl.methods.olora import olora
from jaxcl.methods.replay import replay


@dataclasses.dataclass(frozen=True)
class Config:
    stages: int = 20
    steps: int = 100
    save_every: int = 10
    seed: int = 3


def gauge() -> dict[str, int]:
    """Bytes that this process holds in memory, and its open files (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(os.listdir("/proc/self/fd"))}


def measured(view, progress) -> list[dict]:
    """The eval; where the environment names a file, the gauge is noted there after every stage."""
    items = evaluate(view, progress)
    if file := os.environ.get("JAXCL_TEST_GAUGE"):
        with Path(file).open("a") as f:
            f.write(json.dumps(gauge()) + "\n")
    return items


def build(cfg: Config) -> Experiment:
    stages = [Stage(f"s{i}", Slow(f"s{i}", 64, seed=i), evals=("nll",)) for i in range(cfg.stages)]
    methods = [
        olora(rank=2, alpha=4.0, dropout=0.2, max_stages=cfg.stages), replay(ratio=0.1, capacity=64),
        ewc(strength=20.0, rows=8), lwf(), agem(capacity=32),
    ]  # fmt: skip
    return experiment(
        methods, stages=stages, tx=optax.adam(3e-3), evals=[nll(measured)], batch_size=4, steps=cfg.steps,
        save_every=cfg.save_every, seed=cfg.seed,
    )  # fmt: skip
