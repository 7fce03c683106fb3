"""Hand-made matrices and run directories that the tests of metrics, report and command line share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from jaxcl.metrics.matrix_file import write_matrix

R0 = [0.20, 0.25, 0.10, 0.30]
RANDOM = [0.05, 0.10, 0.05, 0.15]
SINGLE = [0.82, 0.88, 0.65, 0.83]
JOINT = [0.80, 0.91, 0.66, 0.88]
R = [[0.80, 0.30, 0.12, 0.28], [0.70, 0.90, 0.62, 0.33], [0.84, 0.72, 0.60, 0.40], [0.65, 0.93, 0.50, 0.85]]


def card_file(**changes):
    """The card's matrix as a matrix.json object."""
    out = {
        "schema": 1,
        "stages": [{"name": f"s{i}", "evals": [f"e{i}"]} for i in range(4)],
        "evals": [
            {"id": f"e{i}", "metric": "accuracy", "higher_is_better": True, "range": [0, 1], "n": 100}
            | {"role": "task"}
            for i in range(4)
        ],
        "row0": R0,
        "rows": R,
        "random": RANDOM,
        "single": SINGLE,
        "joint": JOINT,
    }
    return json.loads(json.dumps(out | changes))


def write_run(run: Path, hits: np.ndarray, ids=None) -> None:
    """A run directory whose items hit f64[1 + stages, evals, n] (row 0 first) are the whole truth."""
    rows, tasks, n = hits.shape
    cells = hits.mean(-1).tolist()
    obj = card_file(row0=cells[0], rows=cells[1:])
    obj["stages"], obj["evals"] = obj["stages"][:tasks], [e | {"n": n} for e in obj["evals"][:tasks]]
    for k in ("random", "single", "joint"):
        del obj[k]
    (run / "predictions").mkdir(parents=True)
    write_matrix(run / "matrix.json", obj)
    names = ids or [f"item{j}" for j in range(n)]
    for k in range(rows):
        for i in range(tasks):
            with gzip.open(run / "predictions" / f"e{i}.row{k}.jsonl.gz", "wt") as f:
                for j in range(n):
                    item = {"id": names[j], "prediction": "x", "score": float(hits[k, i, j])}
                    f.write(json.dumps(item) + "\n")


EVIL = "<script>alert('1')</script>&\"x_y$%"


def make_run(path, keep: float, *, stages: int = 3, items: int = 60):
    """A run directory in which a task keeps ``keep`` of its score a stage."""
    draws = np.random.default_rng(5).random((1, stages, items))
    p = np.full((stages + 1, stages), 0.2)
    for t, i in np.ndindex(stages, stages):
        p[t + 1, i] = 0.9 * keep ** (t - i) if i <= t else 0.2
    write_run(path, (draws < p[:, :, None]).astype(float))
    config = {"config": {"seed": 0, "note": EVIL}, "methods": {path.name: {"keep": keep}}}
    (path / "config.json").write_text(json.dumps(config))
    log = [{"step": s, "stage": 0, "phase": "main", "loss": 2.0 / (s + 1)} for s in range(30)]
    (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    account = {"steps": 30, "seconds": [{"stage": None, "train": 0.0, "eval": 1.5}]}
    (path / "metrics.json").write_text(json.dumps({"metrics": {}, "accounting": account}))
    return path
