"""Continual pre-training: a small byte decoder reads one domain of text after another, from scratch.

Documents are packed into blocks with next-token targets everywhere; each domain's held-out documents are scored in bits
per byte before the first and after every stage. Any data goes in by name:

    jaxcl run pretrain --data data --set method=replay
    jaxcl run pretrain --data data --set stream=text/language_shift --set window=256 --set separate=true
    jaxcl run pretrain --set data=my/first,my/second
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

import jax
import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.types import Method
from jaxcl.data.named_stages import text_stages
from jaxcl.methods.finetune import finetune
from jaxcl.methods.joint import joint
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios.pretraining import stream_data
from jaxcl.transforms.rewarm import rewarm


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: about a minute on two cores. blocks, test_rows null: all that the data has."""

    method: Literal["sequential", "replay", "joint"] = "replay"
    data: tuple[str, ...] = ("text_domains/wikipedia", "text_domains/biomedical", "text_domains/legal")
    stream: str | None = None  # one of `jaxcl list streams` that begins with text/, instead of data
    train: str = "train"  # splits, as TFDS writes them: all[:90%]
    test: str = "test"
    blocks: int | None = 2400  # of a stage, the first ones of its data
    window: int = 128  # tokens of a block, here bytes
    separate: bool = False  # documents of a block do not see each other
    test_rows: int | None = 12  # documents held out of each, drawn by seed
    batch_size: int = 16
    lr: float = 4e-3  # peak; every stage warms up to it and decays to a tenth
    warmup: float = 0.05  # share of a stage
    replay_ratio: float = 0.1  # of each old stage's blocks
    replay_capacity: int = 1024  # blocks kept of all old stages
    width: int = 96
    layers: int = 2
    seed: int = 0
    save_every: int = 0


def methods(cfg: Config) -> list[Method]:
    if cfg.method == "replay":
        return [replay(ratio=cfg.replay_ratio, capacity=cfg.replay_capacity, seed=cfg.seed)]
    return [joint() if cfg.method == "joint" else finetune()]


def build(cfg: Config) -> Experiment:
    """The experiment; paths are those of --data or $JAXCL_DATA, or files and folders of one's own."""
    words = ByteTokenizer()
    stages, evals = text_stages(
        stream_data(cfg.stream) if cfg.stream else cfg.data,
        words,
        window=cfg.window,
        train=cfg.train,
        test=cfg.test,
        data_dir=os.environ.get("JAXCL_DATA"),
        blocks=cfg.blocks,
        separate=cfg.separate,
        test_rows=cfg.test_rows,
        seed=cfg.seed,
    )
    spec = tiny(width=cfg.width, layers=cfg.layers, context=cfg.window, nll_chunk=cfg.batch_size * cfg.window)
    model = decoder(spec)
    adam = optax.scale_by_adam(b2=0.95)
    return Experiment(
        model=model,
        params=model.init(spec, jax.random.key(cfg.seed)),
        source={"made by": "random initialisation"},
        stages=stages,
        evals=evals,
        methods=methods(cfg),
        tx=optax.chain(optax.clip_by_global_norm(1.0), adam, rewarm(peak=cfg.lr, warmup=cfg.warmup)),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        save_every=cfg.save_every,
        tokenizer=words,
    )
