"""Ranking AG News's four labels: jaxcl beside a batched transformers loop that scores every label separately.

Both sides rank the same rows with the same weights in float32 on two threads, in turn, in one process. The loop sorts
its sequences by length, takes 16 at a time padded to the longest, and reads the log-probabilities of the label's tokens
from the logits: of all positions, or of the last few alone (``logits_to_keep``). Run it from the repository's root:

    taskset -c 0,1 python experiments/benchmarks/ranking.py --data DIR --rows 32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
BATCH = 16
WINDOW = 256
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or a busy machine is paid for by who waits with a spinning thread


class Loop:
    """The other side: one sequence per row and label."""

    def __init__(self, folder: Path, prompts: list[list[int]], labels: list[list[int]], keep: bool):
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch, self.keep = torch, keep
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        pairs = [(i, l) for i in range(len(prompts)) for l in range(len(labels))]
        self.pairs = sorted(pairs, key=lambda p: len(prompts[p[0]]) + len(labels[p[1]]))
        self.prompts, self.labels = prompts, labels

    def __call__(self) -> list[int]:
        """The number of each row's best label."""
        score = [[0.0] * len(self.labels) for _ in self.prompts]
        for at in range(0, len(self.pairs), BATCH):
            part = self.pairs[at : at + BATCH]
            for (i, label), value in zip(part, self.batch([(self.prompts[i], self.labels[l]) for i, l in part])):
                score[i][label] = value
        return [max(range(len(row)), key=row.__getitem__) for row in score]

    def batch(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """Log-probability of each label after its prompt; padding is on the left, so the labels end together."""
        torch = self.torch
        size = max(len(p) + len(l) for p, l in pairs)
        tokens = torch.zeros(len(pairs), size, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (prompt, label) in enumerate(pairs):
            tokens[row, size - len(prompt) - len(label) :] = torch.tensor(prompt + label)
            mask[row, size - len(prompt) - len(label) :] = 1
        longest = max(len(l) for _, l in pairs)
        kept = {"logits_to_keep": longest + 1} if self.keep else {}
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = self.model(
                input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False, **kept
            ).logits[:, -longest - 1 : -1]
            scores = torch.log_softmax(logits, -1).gather(2, tokens[:, -longest:, None])[..., 0]
        return [float(row[longest - len(label) :].sum()) for row, (_, label) in zip(scores, pairs)]


def ours(rows: list[dict[str, Any]]) -> tuple[Callable[[], list[int]], Any, list[list[int]], list[list[int]]]:
    """The evaluator as a function without arguments, the model's parts, and what both sides score: ids."""
    from jaxcl.core.types import Clock
    from jaxcl.core.view import View
    from jaxcl.data.encode import fit_prompt, target_ids
    from jaxcl.data.template import Template
    from jaxcl.evaluate.ranking import label_ranking
    from jaxcl.models.fetch import load

    model, params, tokenizer, _ = load("smollm2-135m-instruct")
    view = View(model).at(model.spec, params, {}, {}, Clock.at())
    made = label_ranking("agnews", rows, tokenizer, window=WINDOW, batch_size=BATCH)
    names = rows[0]["labels"]
    labels = [target_ids({"target": name}, Template(), tokenizer) for name in names]
    room = WINDOW - max(map(len, labels))
    prompts = [fit_prompt(row, Template(), tokenizer, room) for row in rows]

    def run() -> list[int]:
        return [names.index(item["prediction"]) for item in made.run(view, lambda *_: None)]

    return run, (model.spec, params, tokenizer), prompts, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("JAXCL_DATA"), help="folder that holds olora_benchmark/")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2, help="rounds that are not counted")
    args = parser.parse_args()

    from jaxcl.data.jsonl import data_folder, read_rows
    from jaxcl.data.stage import subsample
    from jaxcl.models.export_hf import write_hf

    read = read_rows(data_folder("olora_benchmark", args.data) / "agnews/test.jsonl.gz")
    run, (spec, params, tokenizer), prompts, labels = ours(subsample(read, args.rows, 0))
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), spec, params, tokenizer)
        sides = {"jaxcl": run}
        sides |= {f"loop, {name}": Loop(Path(folder), prompts, labels, keep) for name, keep in KEPT.items()}
    print(json.dumps(compare(sides, args.rows, args.rounds, args.warm), indent=1))


KEPT = {"logits of all positions": False, "logits_to_keep": True}


def compare(sides: dict[str, Callable[[], list[int]]], rows: int, rounds: int, warm: int) -> dict[str, Any]:
    """Rounds in turn: seconds of each side, medians of items per second and of the ratios within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[int]] = {}
    for number in range(warm + rounds):
        for name, side in sides.items():
            wall, used = time.perf_counter(), time.process_time()
            said[name] = side()
            took, work = time.perf_counter() - wall, time.process_time() - used
            print(f"round {number}, {name}: {took:.2f} s, {work:.2f} s of CPU", file=sys.stderr, flush=True)
            if number >= warm:
                seconds[name].append(took)
                cpu[name].append(work)
    first, *others = sides
    report: dict[str, Any] = {"rows": rows, "rounds": rounds}
    for name in sides:
        report[name] = {
            "items_per_second": rows / statistics.median(seconds[name]),
            "cpu_seconds_per_item": statistics.median(cpu[name]) / rows,
            "same_predictions": sum(a == b for a, b in zip(said[first], said[name])),
        }
    for name in others:
        for what, table in (("wall", seconds), ("cpu", cpu)):
            ratios = [b / a for a, b in zip(table[first], table[name])]
            report[name][f"ratio_{what}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return report


if __name__ == "__main__":
    main()
