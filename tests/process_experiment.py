"""Two short stages for several processes, whose devices $JAXCL_TEST_MESH names; evaluated by loss and by generation."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import optax
from killed import Slow, held_out
from resume_experiment import METHODS
from support import Answers, experiment

from jaxcl.core.experiment import Experiment
from jaxcl.core.processes import host
from jaxcl.data.pipeline import batches
from jaxcl.data.stage import Stage
from jaxcl.evaluate.base import Eval
from jaxcl.models.generate import generate


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("replay", "ewc")
    rows: int = 48


def written(apply, head, spec, params, prompts, lengths):
    return generate(apply, head, spec, params, prompts, lengths, max_new=4, stop_ids=())[0]


def loss(view, batch) -> list[dict]:
    nll = host(view.call(held_out, {k: v for k, v in batch.items() if k != "row"}))
    return [{"prediction": None, "score": float(x.sum())} for x in nll]


def answers(view, batch) -> list[dict]:
    lengths = np.array([int(np.min(at[w > 0])) for at, w in zip(batch["targets_at"], batch["weight"], strict=True)])
    made = host(view.call(written, batch["tokens"], lengths.astype(np.int32)))
    return [{"prediction": ids.tolist(), "score": float(ids.sum())} for ids in made]


def evaluator(name: str, measure) -> Eval:
    def evaluate(view, progress) -> list[dict]:
        source = Answers("held out", 8, seed=99)
        items = [item for batch in batches(source, None, 8) for item in measure(view, batch)]
        progress(8, 8)
        return [{"id": source.id(i), **item} for i, item in enumerate(items)]

    return Eval(name, name, 8, evaluate, higher_is_better=False, range=(0.0, float("inf")))


def build(cfg: Config) -> Experiment:
    stages = [Stage(f"s{i}", Slow(f"s{i}", cfg.rows, seed=i)) for i in range(2)]
    return experiment(
        [METHODS[m]() for m in cfg.methods], stages=stages, evals=[evaluator("nll", loss), evaluator("made", answers)],
        tx=optax.sgd(0.05, momentum=0.9), batch_size=4, save_every=3,
        mesh=json.loads(os.environ.get("JAXCL_TEST_MESH", "null")),
    )  # fmt: skip
