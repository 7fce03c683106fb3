"""An epoch with rows packed into windows, beside an epoch of batches padded to their longest row in torch and PEFT.

Both sides train LoRA (rank 8, all seven projections, AdamW) on the same rows of one data set, cut in the same way, with
the same target tokens; so the ratio of the times of an epoch is that of the times of a target token. The torch side
takes 8 rows at a time in random order. From the repository's root:

    JAXCL_DATA=DIR taskset -c 0,1 python experiments/benchmarks/packing.py agnews
    JAXCL_DATA=DIR taskset -c 0,1 python experiments/benchmarks/packing.py superni --rows 32 --window 512 --pack 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import step  # beside this file: also sets the threads of both sides

PADDED = 8
"""Rows of a batch of the other side."""


def sample(name: str, n: int) -> list[dict[str, Any]]:
    """Training rows: of AG News, or the same number of each task of SuperNI."""
    from jaxcl.data.folder import read_split
    from jaxcl.data.jsonl import data_folder
    from jaxcl.data.stage import subsample

    if name == "agnews":
        return subsample(read_split(data_folder("olora_benchmark", None), "agnews", "train"), n, 0)
    folder = data_folder("superni", None)
    tasks = sorted(p.name for p in folder.iterdir() if p.is_dir())
    share = -(-n // len(tasks))
    rows = [row | {"id": f"{task}/{row['id']}"} for task in tasks
            for row in subsample(read_split(folder, task, "train"), share, 0)]  # fmt: skip
    return subsample(rows, n, 1)


def padded(source: Any, seed: int) -> list[tuple[Any, Any]]:
    """Batches in random order, each as long as its longest row: ids with 0 behind the rows' ends, labels with -100."""
    import numpy as np

    order, batches = np.random.default_rng(seed).permutation(len(source)), []
    for first in range(0, len(order), PADDED):
        part = [source[int(i)] for i in order[first : first + PADDED]]
        size = max(int((row["segments"] > 0).sum()) for row in part)
        batches.append(step.torch_batch(part, size))
    return batches


class Epoch:
    """Calling it trains one epoch on one side."""

    def __init__(self, one: Any, steps: int):
        self.one, self.steps = one, steps

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.one()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["agnews", "superni"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="windows of a batch")
    parser.add_argument("--pack", type=int, default=8, help="rows of a window at most")
    parser.add_argument("--layers", type=int, help="cut the model off after so many layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1)
    args = parser.parse_args()

    from jaxcl.bench import sides
    from jaxcl.bench.measure import setting
    from jaxcl.bench.running import Running, at_stage
    from jaxcl.bench.turns import in_turn, summary
    from jaxcl.core.compiled import StepCache
    from jaxcl.core.experiment import Experiment
    from jaxcl.data.pipeline import phase_steps
    from jaxcl.data.stage import Stage, instruct_source
    from jaxcl.models.export_hf import write_hf
    from jaxcl.models.fetch import load

    at = setting("smollm2-135m-instruct", args.layers, args.batch, args.window, 1)
    tokenizer = load("smollm2-135m-instruct")[2]
    source = instruct_source(args.data, sample(args.data, args.rows), tokenizer, window=args.window)
    exp = Experiment(
        model=at.model, params=at.params, stages=[Stage(args.data, source)], methods=sides.trained_by("lora"),
        tx=sides.adamw(), batch_size=args.batch, pack=args.pack, mesh={"data": 1},
    )  # fmt: skip
    [phase] = at_stage(exp, 0).plan(0)
    steps = phase_steps(phase, [source], exp.batch_size, seed=(exp.seed, 0, 0), pack=exp.pack)
    ours = Running(exp, 0, StepCache(exp), steps * (args.rounds + args.warm))
    batches = padded(source, 0)
    tokens = sum(int((source[i]["segments"] > 0).sum()) for i in range(len(source)))
    targets = sum(int(source[i]["weight"].sum()) for i in range(len(source)))
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), at.model.spec, at.params, tokenizer)
        theirs = step.TorchStep(Path(folder), batches, "lora")
        found = summary(in_turn(Epoch(ours, steps), Epoch(theirs, len(batches)), args.rounds, args.warm))
    fill = {
        "rows": len(source), "tokens": tokens, "target_tokens": targets,
        "windows": steps * args.batch, "packed_fill": tokens / (steps * args.batch * args.window),
        "padded_fill": tokens / sum(ids.size for ids, _ in batches),
    }  # fmt: skip
    print(json.dumps({**vars(args), **fill, **found}, indent=1))


if __name__ == "__main__":
    main()
