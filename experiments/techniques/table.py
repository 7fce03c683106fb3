"""All rows of choices.py on three seeds and two orders, and the table of README.md from what they left.

    python experiments/techniques/table.py --out runs/techniques                 # trains what is missing
    python experiments/techniques/table.py --out runs/techniques --only replay   # rows whose name has this
    python experiments/techniques/table.py --out runs/techniques --write         # writes the table of what is there

A run that was stopped continues; ``--jobs 2`` makes two at a time. Steps are timed afterwards, one row after another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import choices
import running

from jaxcl import experiment_files
from jaxcl.core import compile_cache
from jaxcl.metrics.drift import drift
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.metrics.score import score_matrix
from jaxcl.report.marked import fill

SEEDS, ORDERS = (0, 1, 2), ("given", "reversed")
SHOWN = {"AA": "aa", "BWT": "bwt_over_T_minus_1", "FWT": "fwt_vs_zero_shot", "LA": "learning_accuracy"}
HEAD = ("row", *(f"{short} `{name}`" for short, name in SHOWN.items()), "general", "stored", "extra parameters",
        "passes", "step")  # fmt: skip
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Half-widths of 95% intervals of a mean of n values, in standard errors."""
README = Path(__file__).with_name("README.md")


def folder(out: Path, row: str) -> Path:
    return out / row.replace(" + ", "+").replace(" ", "_").replace("(", "").replace(")", "")


def runs(out: Path, row: str) -> dict[tuple[int, str], Path]:
    """{(seed, order): run directory}."""
    return {(seed, order): folder(out, row) / f"{order}-{seed}" for seed in SEEDS for order in ORDERS}


def mean(values: list[float]) -> str:
    """``-1.93 ± 0.04``, a 95% interval by Student's t where there are several values."""
    middle = f"{statistics.mean(values):.3f}"
    if len(values) not in STUDENT:
        return middle
    return f"{middle} ± {STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def line(out: Path, row: str, row_bytes: int, plain: float) -> list[str]:
    """A row's cells, over those of its runs that are finished. plain: rows that fine-tuning trains on."""
    paths = [path for path in runs(out, row).values() if (path / "metrics.json").exists()]
    matrices = [read_matrix(path) for path in paths]
    scores = [score_matrix(m)["metrics"] for m in matrices]
    general = [drift(m)["mean_delta"]["general"]["value"] for m in matrices]
    accounts = [json.loads((path / "metrics.json").read_text(encoding="utf-8"))["accounting"] for path in paths]
    kept = [sum(k["bytes"] + k["examples"] * row_bytes for k in a["kept"].values()) for a in accounts]
    passes = statistics.mean(a["backward_passes"] for a in accounts) / plain
    step = folder(out, row) / "step.json"
    timed = f"{json.loads(step.read_text(encoding='utf-8'))['ratio']:.2f}" if step.exists() else "-"
    extra = accounts[0]["parameters"]["extra"]
    cells = [mean([s[name]["value"] for s in scores]) for name in SHOWN.values()]
    return [row, *cells, mean(general), running.size(max(kept)), f"{extra:,}", f"{passes:.2f}", timed]


def table(module: Any, out: Path) -> str:
    """Markdown of the rows that have runs, by group."""
    there = [row for row in choices.CHOICES if any((p / "metrics.json").exists() for p in runs(out, row).values())]
    one = module.build(module.Config(row="finetune")).stages[0].train[0]
    row_bytes = sum(value.nbytes for value in one.values())
    account = json.loads((runs(out, "finetune")[0, "given"] / "metrics.json").read_text(encoding="utf-8"))["accounting"]
    lines, group = [list(HEAD), ["---"] * len(HEAD)], ""
    for row in there:
        if choices.CHOICES[row].group != group:
            group = choices.CHOICES[row].group
            lines.append([f"**{group}**", *[""] * (len(HEAD) - 1)])
        lines.append(line(out, row, row_bytes, account["backward_passes"]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/techniques"))
    parser.add_argument("--only", nargs="*", default=[], help="Rows with one of these in their names, such as lora.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs made at the same time, each on one core or two.")
    parser.add_argument("--write", action="store_true", help="Write the table into README.md.")
    args = parser.parse_args()
    module = experiment_files.load("techniques")
    if args.write:
        if not (runs(args.out, "finetune")[0, "given"] / "metrics.json").exists():
            parser.error(f"{args.out} has no finished run of 'finetune', the rows to compare with; train first")
        fill(README, "table", table(module, args.out))
        return
    wanted = [row for row in choices.CHOICES if not args.only or any(part in row for part in args.only)]
    # all rows on one seed and order, then on the next, so that rows can be compared early
    todo = {f"{row}, seed {seed}, {order}": ("techniques", [f"row={row}", f"seed={seed}", f"order={order}"], path)
            for seed, order in itertools.product(SEEDS, ORDERS) for row in wanted
            for path in [runs(args.out, row)[seed, order]]}  # fmt: skip
    running.train_all(todo, args.jobs)
    compile_cache.enable()
    for row in wanted:
        file = folder(args.out, row) / "step.json"
        running.time_beside(lambda name: module.build(module.Config(row=name)), "finetune", row, file,
                            rounds=5, warm=1, steps=10)  # fmt: skip


if __name__ == "__main__":
    main()
