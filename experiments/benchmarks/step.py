"""A training step of jaxcl beside the same step in torch: LoRA beside PEFT, full fine-tuning beside transformers.

Same weights in float32, same rows of random ids whose last tokens are the answer, same rank, sites and AdamW, two
threads, sides in turn in one process; torch runs sdpa attention, with the logits of all positions as its trainers do,
with those of the answer alone (which they do not offer), and under torch.compile. ``floor`` is our forward and backward
pass with one adapter in the first layer and none elsewhere. From the repository's root:

    taskset -c 0,1 python experiments/benchmarks/step.py --rounds 5 --warm 5
    taskset -c 0,1 python experiments/benchmarks/step.py --rounds 5 --warm 5 --compile lora full
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
RANK, ALPHA, RATE = 8, 32.0, 1e-4
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or a busy machine is paid for by who waits with a spinning thread


class TorchStep:
    """Calling it trains on the next batch: i64[B,T] ids, and labels that are -100 outside the answer. keep: how many
    tokens the answers at the rows' ends have, for their logits alone; 0: all positions have logits."""

    def __init__(
        self, folder: Path, batches: list[tuple[Any, Any]], work: str, *, compiled: bool = False, keep: int = 0
    ):
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", use_cache=False
        )
        if work == "lora":
            from peft import LoraConfig, get_peft_model

            sites = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
            model = get_peft_model(model, sites)
        self.keep = keep
        self.torch, self.trained = torch, [p for p in model.parameters() if p.requires_grad]
        self.tx = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)
        self.model = torch.compile(model.train()) if compiled else model.train()
        self.batches = [tuple(map(torch.tensor, pair)) for pair in batches]
        self.losses: list[float] = []

    def __call__(self) -> None:
        ids, labels = self.batches[len(self.losses) % len(self.batches)]
        if self.keep:
            logits = self.model(input_ids=ids, logits_to_keep=self.keep + 1).logits[:, :-1]
            loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -self.keep :].flatten())
        else:
            loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.tx.step()
        self.tx.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


def our_step(at: Any, work: str, steps: int) -> Any:
    """The step of `jaxcl.bench`, as the loop takes it."""
    from jaxcl.bench import sides
    from jaxcl.bench.running import Running
    from jaxcl.core.compiled import StepCache
    from jaxcl.registry import constructor

    if work == "floor":
        lowest = constructor("lora")(rank=RANK, alpha=ALPHA, dropout=0.0, targets=["layers/0/attn/q"])
        exp = sides.experiment(at, [lowest], sides.adamw(), stages=1)
    else:
        exp = sides.plain(work, at)
    return Running(exp, 0, StepCache(exp), steps)


def torch_batch(part: list[Any], size: int | None = None) -> tuple[Any, Any]:
    """Rows cut off after ``size`` tokens as (ids i64[B,T], labels i64[B,T], -100 where nothing is asked)."""
    import numpy as np

    ids = np.stack([row["tokens"][:size] for row in part]).astype(np.int64)
    labels = np.full_like(ids, -100)
    for i, row in enumerate(part):
        places = row["targets_at"][row["weight"] > 0]
        labels[i, places] = ids[i, places]
    return ids, labels


def torch_batches(at: Any) -> list[tuple[Any, Any]]:
    """The same rows as ours, in their own order."""
    from jaxcl.bench.sides import random_rows

    rows = random_rows(at, 0)
    starts = range(0, len(rows), at.rows)
    return [torch_batch([rows[i] for i in range(first, first + at.rows)]) for first in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", default=["lora", "full"], help="lora, full (default: both)")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, help="cut the model off after so many layers")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--targets", type=int, default=8, help="answer tokens a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=5, help="rounds that are not counted")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    args = parser.parse_args()

    from jaxcl.bench.measure import setting
    from jaxcl.models.export_hf import write_hf
    from jaxcl.models.fetch import load

    at = setting(args.model, args.layers, args.rows, args.window, args.targets)
    report: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "work"}
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), at.model.spec, at.params, load(args.model)[2])
        for work in args.work:
            ours = our_step(at, work, 10 * (args.rounds + args.warm))
            kinds = {"torch": {}, "torch, answer's logits": {"keep": args.targets}}
            kinds |= {"torch compiled": {"compiled": True}} if args.compile else {}
            others: dict[str, Callable[[], Any]] = {
                name: lambda how=how, work=work: TorchStep(Path(folder), torch_batches(at), work, **how)
                for name, how in kinds.items()
            }
            if work == "lora":
                others["floor"] = lambda: our_step(at, "floor", args.rounds + args.warm)
            for name, make in others.items():
                report[f"{work}, {name}"] = compared(ours, make(), args.rounds, args.warm)
                print(f"{work}, {name}: {report[f'{work}, {name}']}", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))


def compared(ours: Callable[[], None], other: Callable[[], None], rounds: int, warm: int) -> dict[str, Any]:
    """The other side beside ours: ``ratio`` above 1 says that ours is faster by that much."""
    from jaxcl.bench.turns import in_turn, summary

    return summary(in_turn(ours, other, rounds, warm))


if __name__ == "__main__":
    main()
