"""A dozen techniques on SmolLM2-135M-Instruct over O-LoRA's order 1, one run each, and the second table of README.md.

    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1                # runs what is missing
    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1 --only lora    # rows whose name has this
    JAXCL_DATA=DIR python experiments/techniques/order1.py --out runs/order1 --write        # writes the table
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxcl.core.run import run_experiment
from jaxcl.metrics.drift import drift
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.metrics.score import score_matrix
from jaxcl.report.marked import fill

ROWS: dict[str, dict[str, Any]] = {  # settings of `jaxcl run olora_order1` beside its defaults
    "lora": {},
    "inclora": {},
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
}
ALL = {"rows": 160, "test_rows": 64, "general": 32}
SHOWN = {"AA": "aa", "BWT": "bwt_over_T_minus_1", "FWT": "fwt_vs_zero_shot", "LA": "learning_accuracy"}
HEAD = ("row", *(f"{short} `{name}`" for short, name in SHOWN.items()), "general", "kept", "extra parameters",
        "rows trained on", "training seconds beside LoRA's")  # fmt: skip
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
    m, a = read_matrix(out / row), account(out / row)
    scores, change = score_matrix(m, out / row)["metrics"], drift(m)["mean_delta"].get("general", {}).get("value")
    seconds = [sum(s["train"] for s in x["seconds"]) for x in (a, account(out / "lora"))]
    held = a["kept"].values()
    kept = ", ".join(f"{k['examples']} rows" if k["examples"] else f"{k['bytes'] / 2**20:.1f} MiB" for k in held)
    general = "-" if change is None else f"{change:+.3f}"
    extra, trained = f"{a['parameters']['extra']:,}", str(a["backward_passes"])
    return [row, *(cell(scores[name]) for name in SHOWN.values()), general, kept or "0", extra, trained,
            f"{seconds[0] / seconds[1]:.2f}"]  # fmt: skip


def table(out: Path) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(line(out, row) for row in ROWS if (out / row / "metrics.json").exists())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/order1"))
    parser.add_argument("--only", nargs="*", default=[], help="Rows with one of these in their names.")
    parser.add_argument("--write", action="store_true", help="Write the table into README.md.")
    args = parser.parse_args()
    if args.write:
        if not (args.out / "lora" / "metrics.json").exists():
            parser.error(f"{args.out} has no finished run of 'lora', which the others are compared with; run it first")
        fill(README, "order1", table(args.out))
        return
    for row in ROWS:
        if not (args.out / row / "metrics.json").exists() and (not args.only or any(o in row for o in args.only)):
            print(row, flush=True)
            run_experiment("olora_order1", settings(row), out=str(args.out / row))


if __name__ == "__main__":
    main()
