"""A dozen techniques on SmolLM2-135M-Instruct over O-LoRA's order 1, one run each, and the second table of README.md.

    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1 --jobs 2       # runs what is missing
    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1 --only lora    # rows whose name has this
    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1 --write        # writes the table

Two runs at a time take less than one after another, since each compiles on one core. Steps are timed afterwards.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import running

from jaxcl import experiment_files
from jaxcl.core import compile_cache
from jaxcl.core.config import override
from jaxcl.metrics.drift import drift
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.metrics.score import score_matrix
from jaxcl.report.marked import fill

ROWS: dict[str, dict[str, Any]] = {  # settings of `jaxcl run olora_order1` beside its defaults
    "lora": {},
    "olora": {},
    "inflora": {},
    "lora_experts": {},
    "bottleneck": {},
    "ia3": {"learning_rate": 1e-2},
    "prompt_tuning": {"learning_rate": 3e-2},
    "replay": {},
    "mir": {},
    "ewc": {},
    "lwf": {},
    "agem": {},
    "joint": {},
    "inclora": {},
}
SETS = ("ARC-Easy", "boolq", "openbookqa", "piqa", "social_i_qa", "wikipedia")
ALL = {"rows": 160, "test_rows": 64, "general": 24, "general_sets": ",".join(SETS)}
SHOWN = {"AA": "aa", "BWT": "bwt_over_T_minus_1", "FWT": "fwt_vs_zero_shot", "LA": "learning_accuracy"}
HEAD = ("row", *(f"{short} `{name}`" for short, name in SHOWN.items()), "general", "perplexity", "stored",
        "extra parameters", "passes", "step")  # fmt: skip
README = Path(__file__).with_name("README.md")


def settings(row: str) -> list[str]:
    return [f"{key}={value}" for key, value in {"method": row, **ALL, **ROWS[row]}.items()]


def cell(found: dict[str, Any]) -> str:
    """The number with its 95% interval over test items."""
    between = " [{:.3f}, {:.3f}]".format(*found["interval"]) if "interval" in found else ""
    return f"{found['value']:.3f}{between}"


def account(path: Path) -> dict[str, Any]:
    return json.loads((path / "metrics.json").read_text(encoding="utf-8"))["accounting"]


def line(out: Path, row: str) -> list[str]:
    m, a, plain = read_matrix(out / row), account(out / row), account(out / "lora")["backward_passes"]
    scores, change = score_matrix(m, out / row)["metrics"], drift(m)
    held = a["kept"].values()
    kept = ", ".join(f"{k['examples']} rows" if k["examples"] else running.size(k["bytes"]) for k in held)
    general = f"{change['mean_delta']['general']['value']:+.3f}"
    perplexity = f"{change['evals']['general/wikipedia']['relative_perplexity']:.2f}"
    step = out / row / "step.json"
    timed = f"{json.loads(step.read_text(encoding='utf-8'))['ratio']:.2f}" if step.exists() else "-"
    extra, passes = f"{a['parameters']['extra']:,}", f"{a['backward_passes'] / plain:.2f}"
    return [row, *(cell(scores[name]) for name in SHOWN.values()), general, perplexity, kept or "0", extra, passes,
            timed]  # fmt: skip


def table(out: Path) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(line(out, row) for row in ROWS if (out / row / "metrics.json").exists())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/order1"))
    parser.add_argument("--only", nargs="*", default=[], help="Rows with one of these in their names.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs made at the same time; each needs 5 GiB.")
    parser.add_argument("--write", action="store_true", help="Write the table into README.md.")
    args = parser.parse_args()
    if args.write:
        if not (args.out / "lora" / "metrics.json").exists():
            parser.error(f"{args.out} has no finished run of 'lora', which the others are compared with; run it first")
        fill(README, "order1", table(args.out))
        return
    wanted = [row for row in ROWS if not args.only or any(part in row for part in args.only)]
    running.train_all({row: ("olora_order1", settings(row), args.out / row) for row in wanted}, args.jobs)
    compile_cache.enable()
    module = experiment_files.load("olora_order1")

    def build(row: str) -> Any:
        return module.build(override(module.Config(), settings(row)))

    for row in wanted:
        running.time_beside(build, "lora", row, args.out / row / "step.json", rounds=5, warm=2, steps=1)


if __name__ == "__main__":
    main()
