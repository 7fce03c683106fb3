"""From the start of a process to the end of its first training step: with and without compiled programs kept.

The process does what `jaxcl run` does until then: imports, weights, methods' host code, data pipeline, the step traced,
compiled or read from the cache, one step taken. Both sides take turns. Run it from the repository's root:

    python experiments/benchmarks/start.py --model smollm2-135m-instruct --base lora --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_step(model: str, base: str) -> None:
    """The process that is measured: prints the seconds that its parts took, by this process's own clock."""
    began = time.perf_counter()
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        marks[name], began = now - began, now

    from jaxcl.bench import measure, sides
    from jaxcl.core import compile_cache

    compile_cache.enable()
    mark("imports")
    at = measure.setting(model, None, 8, 128, 8)
    mark("weights")
    run, _ = measure.running(sides.plain(base, at), 0, 4)
    mark("step built")
    run()
    mark("step taken")
    print(json.dumps(marks))


def timed(args: argparse.Namespace, cache: Path) -> tuple[float, dict[str, float]]:
    """(wall seconds of the whole process, those of its parts)."""
    command = [sys.executable, __file__, "--child", "--model", args.model, "--base", args.base]
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAXCL_CACHE": str(cache)}
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--base", default="lora", help="full, lora or 'lora q v'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first_step(args.model, args.base)
        return

    from jaxcl.caches import cache_folder

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        if cache_folder().joinpath("models").is_dir():
            cache.joinpath("models").symlink_to(cache_folder() / "models")
        rounds = []
        for number in range(args.rounds):
            shutil.rmtree(cache / "compiled", ignore_errors=True)
            (cold, cold_parts), (warm, warm_parts) = timed(args, cache), timed(args, cache)
            rounds.append({"cold": cold, "warm": warm, "cold_parts": cold_parts, "warm_parts": warm_parts})
            print(f"round {number}: cold {cold:.1f} s, warm {warm:.1f} s", file=sys.stderr, flush=True)
        size = sum(f.stat().st_size for f in cache.joinpath("compiled").rglob("*") if f.is_file())
    ratios = [r["warm"] / r["cold"] for r in rounds]
    summary = {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], "cache_bytes": size}
    print(json.dumps({"model": args.model, "base": args.base, **summary, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
