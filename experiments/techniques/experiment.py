"""Techniques of continual learning side by side: a small byte decoder learns eight kinds of text one after another.

    jaxcl run techniques --set row=ewc --set seed=1 --set order=reversed
    python experiments/techniques/table.py --out runs/techniques

The base is the demo's: 2 layers, width 128, pretrained for a moment on a mix of all kinds. A row is 24 bytes of a text
and the 38 that follow, which are what is learned; the score is their nll in nats per byte, of texts that are held out.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any, Literal

import choices
import kinds
import numpy as np
import optax

from jaxcl.caches import cache_folder
from jaxcl.core.config import short_hash
from jaxcl.core.experiment import Experiment
from jaxcl.core.processes import host
from jaxcl.core.til import til
from jaxcl.data.encode import encode
from jaxcl.data.pipeline import stack
from jaxcl.data.stage import Rows, Stage
from jaxcl.errors import unknown
from jaxcl.evaluate.base import Eval, Item, Progress
from jaxcl.evaluate.editing import mean_nll
from jaxcl.experiment_files import load
from jaxcl.models.decoder import decoder
from jaxcl.transforms.mofo import mofo

demo = load("demo")
pretrain, text = demo.pretrain, demo.text
PIECES = 384  # of each kind in the base's mix


@dataclasses.dataclass(frozen=True)
class Config:
    """row: a name of choices.py. order: of the stages. The rest are sizes, the same for all rows."""

    row: str = "ewc"
    seed: int = 0
    order: Literal["given", "reversed"] = "given"
    width: int = 128
    layers: int = 2
    window: int = 64  # bytes, with the marks at both ends
    prompt: int = 24  # bytes of it that are given
    batch_size: int = 16
    base_steps: int = 400
    base_lr: float = 3e-3
    rows: int = 320  # of a stage
    epochs: float = 2.0
    test_rows: int = 32  # of each kind


def build(cfg: Config) -> Experiment:
    """The run of one row of the table."""
    if cfg.row not in choices.CHOICES:
        raise unknown("row", cfg.row, choices.CHOICES, where="--set row")
    choice = choices.CHOICES[cfg.row]
    dealt = {name: text.deal(read()) for name, read in kinds.ALL.items()}
    params, digest = base(cfg, [part.base for part in dealt.values()])
    order = list(kinds.KINDS) if cfg.order == "given" else list(kinds.KINDS)[::-1]
    tests = {name: source(f"{name}-test", part.test, cfg.test_rows, cfg) for name, part in dealt.items()}
    exp = Experiment(
        model=decoder(dataclasses.replace(pretrain.spec(cfg), context=3 * cfg.window)),  # room for prompts
        params=params,
        source={"made by": "a moment of pretraining", "sha256": digest},
        stages=[Stage(name, source(name, dealt[name].train, cfg.rows, cfg), (name,)) for name in order],
        evals=[held_out(name, tests[name], "task" if name in order else "general") for name in (*order, kinds.GENERAL)],
        methods=choice.make(),
        tx=optimizer(choice),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        seed=cfg.seed,
        save_every=0,
        keep=1,
        tokenizer=pretrain.TOKENIZER,
    )
    return til(exp) if choice.told else exp


def base(cfg: Config, texts: Sequence[Sequence[str]]) -> tuple[Any, str]:
    """(parameters, SHA-256) of the base, trained when it is not in the cache."""
    key = pretrain.identity(cfg) | {"python": platform.python_version(), "kinds": list(kinds.ALL)}
    folder = cache_folder() / "techniques" / short_hash(key)
    if (folder / "metrics.json").exists():  # as it is for all but the first of many runs: nothing to lock
        return pretrain.finished(folder)
    return pretrain.weights(cfg, texts, folder, pieces=PIECES)


def optimizer(choice: choices.Choice) -> optax.GradientTransformation:
    """The demo's, with MoFO in Adam's place where the row asks for it."""
    if not choice.mofo:
        return pretrain.optimizer(choice.rate)
    return optax.chain(optax.clip_by_global_norm(1.0), mofo(optax.linear_schedule(0.0, choice.rate, 8), b2=0.99))


def source(name: str, documents: Sequence[str], count: int, cfg: Config) -> Rows:
    """``count`` rows: a start mark and ``cfg.prompt`` bytes, then the bytes that follow and an end mark."""
    marks, pieces = pretrain.TOKENIZER, text.excerpts(documents, cfg.window - 2, count)
    ids = [marks.encode(piece) for piece in pieces]
    room = cfg.window - cfg.prompt - 1

    def row(i: int) -> dict[str, Any]:
        prompt, answer = [marks.eos_id, *ids[i][: cfg.prompt]], [*ids[i][cfg.prompt :], marks.eos_id]
        return encode(prompt, answer, cfg.window, room, pad=marks.pad_id, row=i)

    records = [{"id": f"{name}-{i}", "text": piece} for i, piece in enumerate(pieces)]
    return Rows(name, records, row, lambda _: name)


def held_out(eval_id: str, rows: Rows, role: str) -> Eval:
    """Nats per byte of what follows the prompts, the end mark included."""
    batch = stack([rows[i] for i in range(len(rows))])

    def run(view: Any, progress: Progress) -> list[Item]:
        scores = host(view.call(mean_nll, batch))
        progress(len(rows), len(rows))
        return [{"id": rows.id(i), "prediction": None, "score": float(x)} for i, x in enumerate(scores)]

    return Eval(eval_id, "nll", len(rows), run, higher_is_better=False, range=(0.0, np.inf), role=role)
