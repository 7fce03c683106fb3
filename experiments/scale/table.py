"""The table of README.md: plans of large models on six slices, kept as JSON in a folder, so that it can stop and go on.

    python experiments/scale/table.py --out runs/scale             # compiles what is missing
    python experiments/scale/table.py --out runs/scale --write     # writes the table of what is there
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxcl.plan.show import amount, gib
from jaxcl.report.marked import fill

CASES = (  # model, method, further settings
    ("qwen3-1.7b", "olora", ()),
    ("qwen3-1.7b", "ewc", ()),
    ("qwen3-1.7b", "lwf", ()),
    ("llama3-8b", "olora", ()),
    ("llama3-8b", "ewc", ()),
    ("llama3-8b", "lwf", ()),
    ("llama3-70b", "lora", ()),
)
SLICES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x16")
HEAD = ("model", "method", "slice", "chips", "memory of a chip", "FLOPs of a chip", "sent by a chip", "step at least",
        "bound by", "MFU at most", "fits")  # fmt: skip
README = Path(__file__).with_name("README.md")


def command(model: str, method: str, settings: tuple[str, ...], topology: str) -> list[str]:
    chosen = (f"model={model}", f"method={method}", *settings)
    sets = [word for setting in chosen for word in ("--set", setting)]
    return ["plan", "scale", "--topology", topology, *sets, "--suggest", "--json"]


def compile_missing(out: Path, wanted: list[str], jobs: int) -> None:
    """One process a plan, ``jobs`` at a time; a file is written when its plan is there. ``wanted``: parts of the names
    of plans."""
    out.mkdir(parents=True, exist_ok=True)
    plans = {f"{case[0]}-{case[1]}-{t.replace(':', '-')}": (*case, t) for case in CASES for t in SLICES}
    missing = [n for n in plans if not (out / f"{n}.json").exists() and all(part in n for part in wanted)]

    def compile_one(name: str) -> None:
        began, words = time.monotonic(), [sys.executable, "-m", "jaxcl", *command(*plans[name])]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            (out / f"{name}.json").write_text(done.stdout, encoding="utf-8")
        said = f"planned in {time.monotonic() - began:.0f} s" if done.returncode == 0 else done.stderr.strip()[-300:]
        print(f"{name}: {said}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, missing))


def row(found: dict[str, Any]) -> list[str]:
    """A plan as cells. What was changed to make it fit stands in the last one."""
    cfg, line, memory = found["config"], found.get("roofline"), found["memory"]
    changes = ", ".join(f"`{c['change']}`" for c in found.get("changes", ()))
    fits = "yes" if not changes else f"with {changes}" if found["fits"] else f"no, even with {changes}"
    if not found["fits"]:
        fits = (fits if changes else "no") + f"; at least {found['least_chips']} chips"
    before = found.get("unchanged", found)["memory"]["total"]
    need = gib(memory["total"]) if memory["total"] == before else f"{gib(memory['total'])}, without {gib(before)}"
    times = ["-"] * 4 if line is None else [
        amount(line["sent_bytes"], "B"), f"{line['step_s']:.2f} s", line["bound"], f"{line['mfu']:.0%}"
    ]  # fmt: skip
    work = amount(found["flops"]["per_chip"], "")
    return [cfg["model"], cfg["method"], found["topology"], str(found["devices"]), need, work, *times, fits]


def table(out: Path) -> str:
    """Markdown of all plans in the folder, in the order of `CASES` and `SLICES`."""
    names = [f"{m}-{k}-{t.replace(':', '-')}.json" for m, k, _ in CASES for t in SLICES]
    rows = [row(json.loads((out / n).read_text(encoding="utf-8"))) for n in names if (out / n).exists()]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--only", nargs="*", default=[], help="Parts of a plan's name, such as llama3-8b v5e.")
    parser.add_argument("--jobs", type=int, default=1, help="Plans made at the same time, each on about one core.")
    parser.add_argument("--write", action="store_true", help="Write the table into README.md.")
    args = parser.parse_args()
    if args.write:
        fill(README, "table", table(args.out))
    else:
        compile_missing(args.out, args.only, args.jobs)


if __name__ == "__main__":
    main()
