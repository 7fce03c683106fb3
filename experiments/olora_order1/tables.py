"""Prints the tables of this folder's README from finished runs.

    python experiments/olora_order1/tables.py runs/order1/lora runs/order1/olora ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from jaxcl.metrics.bootstrap import differences
from jaxcl.metrics.matrix_file import Matrix, read_matrix
from jaxcl.metrics.score import score_matrix

SHOWN = ("aa", "bwt_over_T_minus_1", "fgt_max", "learning_accuracy", "zero_shot_gain")


def cell(found: dict) -> str:
    """``0.492 [0.438, 0.547]``."""
    between = " [{:.3f}, {:.3f}]".format(*found["interval"]) if "interval" in found else ""
    return f"{found['value']:.3f}{between}"


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*names: str) -> str:
    return line(*names) + "\n" + line(*["---"] * len(names))


def metrics(runs: dict[str, Path]) -> str:
    """AA, BWT and others under their conventions' names, 95% intervals of a bootstrap over test items."""
    rows = [head("run", *(f"`{m}`" for m in SHOWN))]
    for name, path in runs.items():
        scores = score_matrix(read_matrix(path), path)["metrics"]
        rows.append(line(name, *(cell(scores[m]) for m in SHOWN)))
    return "\n".join(rows)


def paired(runs: dict[str, Path]) -> str:
    """Differences to the first run on the same items, and whether their interval covers 0."""
    (first, base), *others = runs.items()
    own = score_matrix(read_matrix(base))["metrics"]
    rows = [head("minus " + first, *(f"`{m}`" for m in SHOWN))]
    for name, path in others:
        found, reason = differences((read_matrix(base), base), (read_matrix(path), path))
        assert not reason, reason
        theirs = score_matrix(read_matrix(path))["metrics"]
        rows.append(line(name, *(difference(theirs[m]["value"] - own[m]["value"], *found[m]) for m in SHOWN)))
    return "\n".join(rows)


def difference(value: float, low: float, high: float) -> str:
    """The difference and its interval, starred where the interval does not cover 0."""
    mark = "" if low <= 0 <= high else " *"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"


def matrix(m: Matrix) -> str:
    rows = [head("", *(e.id for e in m.evals)), line("before training", *(f"{v:.3f}" for v in m.row0))]
    rows += [line(f"after {s.name}", *(f"{v:.3f}" for v in r)) for s, r in zip(m.stages, m.rows, strict=False)]
    return "\n".join(rows)


def cost(runs: dict[str, Path]) -> str:
    """Wall time split in training and evaluation, steps, and what is kept beside the base."""
    columns = ("steps", "training s", "evaluation s", "extra parameters", "past rows open to it")
    rows = [head("run", *columns, "compilations of the step")]
    for name, path in runs.items():
        account = json.loads((path / "metrics.json").read_text())["accounting"]
        spent = [sum(s[k] for s in account["seconds"]) for k in ("train", "eval")]
        extra, past = account["parameters"]["extra"], account.get("past_rows_read", 0)
        compiled = account["compilations"]["train_step"]
        times = [f"{s:.0f}" for s in spent]
        rows.append(line(name, str(account["steps"]), *times, f"{extra:,}", str(past), str(compiled)))
    return "\n".join(rows)


def reference(folder: Path) -> str:
    """The released runs of O-LoRA on T5-large: final accuracy per task, in the same order, as shares of 1."""
    runs = json.loads((folder / "olora_benchmark" / "reference_results.json").read_text())["runs"]
    tasks = ("dbpedia", "amazon", "yahoo", "agnews")
    rows = [head("T5-large, after agnews", *tasks, "`aa`", "`bwt_over_T_minus_1`")]
    for name, run in runs.items():
        if not name.startswith("order1_"):
            continue
        steps = {s["trained_on"]: s["exact_match_per_task"] for s in run["steps"]}
        last = [steps["agnews"][t] / 100 for t in tasks]
        learned = [steps[t].get(t) for t in tasks]
        change = [v - d / 100 for v, d in zip(last[:-1], learned[:-1], strict=True) if d is not None]
        bwt = f"{sum(change) / len(change):+.3f}" if len(change) == len(tasks) - 1 else "one step without scores"
        aa = f"{sum(last) / len(last):.3f}"
        rows.append(line(name.removeprefix("order1_"), *(f"{v:.3f}" for v in last), aa, bwt))
    return "\n".join(rows)


if __name__ == "__main__":
    found = {Path(p).name: Path(p) for p in sys.argv[1:]}
    print(metrics(found), paired(found), cost(found), sep="\n\n")
    if os.environ.get("JAXCL_DATA"):
        print("\n" + reference(Path(os.environ["JAXCL_DATA"])))
    for name, path in found.items():
        print(f"\n{name}\n\n{matrix(read_matrix(path))}")
