"""Sequential edits by GRACE: jaxcl beside a loop of single edits in torch, as editing libraries do them.

Both sides edit SmolLM2-135M-Instruct in float32 with the same rows of ZsRE, in turn, in one process, with a codebook
that holds many keys already. The loop does for every row what the reference does: a forward pass that tells whether the
model errs, the nearest key, the rule that adds, widens or splits a ball, and ``--steps`` of Adam on one value, each a
forward and a backward pass with the logits of all positions. Run it from the repository's root:

    python experiments/benchmarks/grace.py --data DIR --edits 1 --rounds 5 --steps 100 --keys 900
    python experiments/benchmarks/grace.py --data DIR --edits 1 --rounds 799 --every 50 --steps 10 --keys 1
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
GAP = 1e-5


class Loop:
    """GRACE beside ``layers/<layer>/mlp/down`` of a transformers model: replacement at the prompt's last token."""

    def __init__(self, folder: Path, layer: int, keys: Any, values: Any, steps: int, eps: float = 1.0):
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch, self.steps, self.eps_init = torch, steps, eps
        make = transformers.AutoModelForCausalLM.from_pretrained
        self.model = make(folder, dtype=torch.float32, attn_implementation="sdpa").eval().requires_grad_(False)
        self.keys, self.values = torch.tensor(keys), [torch.tensor(v) for v in values]
        self.eps, self.labels = [eps] * len(keys), [()] * len(keys)
        self.at, self.query, self.training = 0, None, None
        self.model.model.layers[layer].mlp.down_proj.register_forward_hook(self.replace)

    def replace(self, module: Any, args: tuple, out: Any) -> Any:
        """The site's output with a value at the query, where a ball holds it or one is being trained."""
        self.query = args[0][0, self.at].detach()
        row, distance = self.nearest()
        value = self.training
        if value is None:
            if distance > self.eps[row]:
                return out
            value = self.values[row]
        before, after = out[:, : self.at], out[:, self.at + 1 :]
        return self.torch.cat([before, value[None, None], after], 1)

    def nearest(self) -> tuple[int, float]:
        distances = self.torch.cdist(self.query[None], self.keys)[0]
        row = int(distances.argmin())
        return row, float(distances[row])

    def logits(self, ids: Any, answer: tuple[int, ...]) -> Any:
        return self.model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]

    def edit(self, prompt: list[int], answer: tuple[int, ...]) -> bool:
        """One row; whether it was edited."""
        torch = self.torch
        ids, wanted = torch.tensor([[*prompt, *answer]]), torch.tensor(answer)
        self.at, self.training = len(prompt) - 1, None
        with torch.no_grad():
            if bool((self.logits(ids, answer).argmax(-1) == wanted).all()):
                return False
        row = self.rule(answer)
        value = self.values[row].clone().requires_grad_(True)
        adam, self.training = torch.optim.Adam([value], lr=1.0), value
        for _ in range(self.steps):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(self.logits(ids, answer), wanted).backward()
            adam.step()
        self.values[row], self.training = value.detach(), None
        return True

    def rule(self, answer: tuple[int, ...]) -> int:
        """Adds, widens or splits a ball; the row whose value is to be trained."""
        row, distance = self.nearest()
        near = distance <= self.eps_init + self.eps[row]
        if near and self.labels[row] == answer:
            self.eps[row] = max(self.eps[row], distance)
            return row
        if near:
            self.eps[row] = distance / 2 - GAP
        self.keys = self.torch.cat([self.keys, self.query[None]])
        self.values.append(self.torch.rand(len(self.values[0])))
        self.eps.append(distance / 2 if near else self.eps_init)
        self.labels.append(answer)
        return len(self.eps) - 1


def ours(args: argparse.Namespace) -> tuple[Any, Any]:
    """(the step of a stage of edits, the parts of its model), its codebook filled."""
    import optax

    from jaxcl.bench.running import Running
    from jaxcl.bench.sides import filled
    from jaxcl.core import compile_cache
    from jaxcl.core.compiled import StepCache
    from jaxcl.core.experiment import Experiment
    from jaxcl.data.editing import edit_records, edit_source
    from jaxcl.data.stage import Stage
    from jaxcl.methods.grace import grace
    from jaxcl.models.fetch import load

    compile_cache.enable()
    calls = args.rounds + args.warm
    model, params, tokenizer, _ = load("smollm2-135m-instruct")
    source = edit_source("zsre", edit_records("zsre", args.data, rows=args.edits * calls), tokenizer)
    exp = Experiment(
        model=model, params=params, stages=[Stage("zsre", source)], tx=optax.identity(), batch_size=args.edits,
        methods=[grace(n_iter=args.steps, capacity=args.keys + len(source))], mesh={"data": 1},
    )  # fmt: skip
    fill = functools.partial(filled, keys=args.keys)
    return Running(exp, 0, StepCache(exp), calls, fill), (model.spec, params, tokenizer)


def rows_of(batch: dict[str, Any]) -> list[tuple[list[int], tuple[int, ...]]]:
    """(prompt, answer) ids of a host batch's rows."""
    found = []
    for tokens, at in zip(batch["tokens"], batch["targets_at"]):
        places = at[at > 0]
        found.append((tokens[: places[0]].tolist(), tuple(tokens[places].tolist())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("JAXCL_DATA"))
    parser.add_argument("--edits", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--every", type=int, default=1, help="the loop takes part in one round of so many")
    parser.add_argument("--steps", type=int, default=100, help="of the inner loop")
    parser.add_argument("--keys", type=int, default=900, help="in the codebook to begin with")
    args = parser.parse_args()

    from jaxcl.models.export_hf import write_hf

    run, (spec, params, tokenizer) = ours(args)
    book = run.state.live["grace"]["book"]
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), spec, params, tokenizer)
        keys, values = (book[part][: args.keys].__array__().copy() for part in ("keys", "values"))
        loop = Loop(Path(folder), spec.layers * 27 // 32, keys, values, args.steps)
    seconds, found, made = [], [], 0
    for number in range(-args.warm, args.rounds):
        began, cpu = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - began)
        if number > 0 and number % args.every:
            continue
        used, middle = time.process_time(), time.perf_counter()
        made += sum(loop.edit(*row) for row in rows_of(run.feed.read))
        done = (seconds[-1], time.perf_counter() - middle, used - cpu, time.process_time() - used)
        print("jaxcl {:.1f} s, torch {:.1f} s; of CPU {:.1f} and {:.1f}".format(*done), file=sys.stderr, flush=True)
        found.append(done)
    found = found[args.warm :]
    wall, cpu = ([b / a for a, b in pairs] for pairs in ([(r[0], r[1]) for r in found], [(r[2], r[3]) for r in found]))
    print(json.dumps({
        "edits_a_round": args.edits, "inner_steps": args.steps, "keys": args.keys, "rounds": args.rounds,
        "rounds_of_torch": len(found), "edits_per_second": args.edits / statistics.mean(seconds[args.warm :]),
        "torch_edits_per_second": args.edits / statistics.mean(r[1] for r in found),
        "times_as_many": statistics.median(wall), "range": [min(wall), max(wall)], "by_cpu": statistics.median(cpu),
        "edited": [int(run.state.live["grace"]["made"].sum()), made],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
