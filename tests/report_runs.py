"""Run directories for the tests of the report, with test items drawn from a known law: seeds, orders, general evals."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcl.metrics.matrix_file import write_matrix

STAGES = ("alpha", "beta", "gamma")


def make_stream_run(
    path: Path,
    methods: dict | None = None,
    *,
    keep: float = 0.6,
    seed: int = 0,
    stages: Sequence[str] = STAGES,
    learns: Sequence[str] | None = None,
    done: int | None = None,
    items: int = 40,
    general: Sequence[str] = (),
    steps: int = 20,
) -> Path:
    """A run directory. A task scores 0.9 right after its stage and keeps the share ``keep`` of it with every later one;
    every general eval starts at 0.6 and loses 0.03 a stage. stages: all tasks; learns: those trained on, in order."""
    learned, rng = list(learns or stages), np.random.default_rng([seed, 1])
    rows = 1 + (len(learned) if done is None else done)
    evals, cells = [*stages, *general], np.zeros((rows, len(stages) + len(general)))
    (path / "predictions").mkdir(parents=True)
    for i, name in enumerate(evals):
        draws = rng.random(items)  # the same items in every row
        own = learned.index(name) if name in learned else None
        for t in range(rows):
            task = 0.25 if own is None or t <= own else 0.9 * keep ** (t - own - 1)
            hits = (draws < (0.6 - 0.03 * t if name in general else task)).astype(float)
            cells[t, i] = hits.mean()
            answers = [{"id": f"item{j}", "prediction": "x", "score": h} for j, h in enumerate(hits)]
            with gzip.open(path / "predictions" / f"{name}.row{t}.jsonl.gz", "wt") as f:
                f.writelines(json.dumps(a) + "\n" for a in answers)
    write_matrix(path / "matrix.json", {
        "schema": 1,
        "stages": [{"name": s, "evals": [s]} for s in learned],
        "evals": [{"id": e, "metric": "accuracy", "higher_is_better": True, "range": [0, 1], "n": items,
                   "role": "general" if e in general else "task"} for e in evals],
        "row0": cells[0].tolist(), "rows": cells[1:].tolist(),
    })  # fmt: skip
    config = {"experiment": "made", "config": {"seed": seed, "lr": 0.001}, "seed": seed}
    config |= {"methods": methods or {"finetune": {}}}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "log.jsonl").open("w") as f:
        for k in range(steps * (rows - 1)):
            loss = 0.4 + 2 * np.exp(-(k % steps) / 6) + 0.1 * rng.random()
            line = {"step": k, "stage": k // steps, "phase": "train", "loss": loss + 9, "objective": loss}
            f.write(json.dumps(line) + "\n")
    account = {
        "seconds": [{"stage": s, "train": 2.5, "eval": 0.5} for s in (None, *learned)], "steps": steps * (rows - 1),
        "forward_passes": 8 * steps * (rows - 1), "backward_passes": 8 * steps * (rows - 1), "past_rows_read": 0,
        "kept": {"replay": {"examples": 512, "bytes": 8192}} if "replay" in (methods or {}) else {},
        "parameters": {"base": 427008, "extra": 4096, "trained": 4096}, "compilations": {"train_step": 1, "all": 9},
    }  # fmt: skip
    if rows > len(learned):
        (path / "metrics.json").write_text(json.dumps({"metrics": {}, "accounting": account}))
    return path
