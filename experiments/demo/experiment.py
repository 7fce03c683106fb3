"""A small byte decoder meets four kinds of text that every Python carries, one after another.

The base is pretrained for a moment on a mix of all four, so that every stage starts from a model that can do
something. The score is bits per byte of held-out text, lower is better. One method a run: sequential fine-tuning,
replay, EWC, O-LoRA, O-LoRA + replay, or joint training.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import pretrain
import text

from jaxcl.caches import cache_folder
from jaxcl.core.config import short_hash
from jaxcl.core.experiment import Experiment
from jaxcl.core.progress import Reporter
from jaxcl.core.types import Method, Params
from jaxcl.data.stage import Stage
from jaxcl.evaluate.base import Eval
from jaxcl.evaluate.nll import text_nll
from jaxcl.methods.ewc import ewc
from jaxcl.methods.finetune import finetune
from jaxcl.methods.joint import joint
from jaxcl.methods.olora import olora
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder

Name = Literal["sequential", "replay", "ewc", "olora", "olora_replay", "joint"]
RUNS: tuple[str, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes: all six runs in about two minutes on two cores. Strengths and rates were chosen on seed 0, see README."""

    method: Name = "replay"
    seed: int = 0
    width: int = 128
    layers: int = 2
    window: int = 64  # bytes
    batch_size: int = 16
    base_steps: int = 400
    base_lr: float = 3e-3
    steps: int = 48  # of one stage, without what replay and joint training add
    test_rows: int = 32  # of each kind
    lr: float = 1e-3
    adapter_lr: float = 2e-3  # O-LoRA: below, a stage teaches it less; above, it forgets more
    replay_ratio: float = 0.25  # rows of each old stage drawn, as a share of its rows
    replay_capacity: int = 512  # rows kept of all old stages together
    ewc_strength: float = 3.0  # lowest mean loss at the end of 0.3, 1, 3, 10
    ewc_rows: int = 64
    olora_rank: int = 8
    olora_strength: float = 2.0  # more changes nothing: the new directions are orthogonal already


def _olora(cfg: Config) -> Method:
    return olora(
        rank=cfg.olora_rank, alpha=4.0 * cfg.olora_rank, dropout=0.0, strength=cfg.olora_strength,
        targets=("attn/*", "mlp/*"), max_stages=len(text.KINDS),
    )  # fmt: skip


def _replay(cfg: Config) -> Method:
    return replay(ratio=cfg.replay_ratio, capacity=cfg.replay_capacity)


METHODS: dict[str, Callable[[Config], list[Method]]] = {
    "sequential": lambda cfg: [finetune()],
    "replay": lambda cfg: [_replay(cfg)],
    "ewc": lambda cfg: [ewc(strength=cfg.ewc_strength, rows=cfg.ewc_rows)],
    "olora": lambda cfg: [_olora(cfg)],
    "olora_replay": lambda cfg: [_olora(cfg), _replay(cfg)],
    "joint": lambda cfg: [joint()],
}


def build(cfg: Config, weights: tuple[Params, str] | None = None) -> Experiment:
    """The run of one method on the weights of `base` (default: those in the cache, trained when absent)."""
    params, digest = weights or base(cfg, cache_folder() / "demo" / _hash(cfg))
    kinds = _kinds()
    return Experiment(
        model=decoder(pretrain.spec(cfg)),
        params=params,
        source={"made by": "a moment of pretraining", "sha256": digest},
        stages=[stage(k, t.train, cfg) for k, t in kinds.items()],
        evals=[held_out(k, t.test, cfg) for k, t in kinds.items()],
        methods=METHODS[cfg.method](cfg),
        tx=pretrain.optimizer(cfg.adapter_lr if cfg.method.startswith("olora") else cfg.lr),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        save_every=0,
        keep=1,
        tokenizer=pretrain.TOKENIZER,
    )


def base(cfg: Config, folder: Path, reporter: Reporter | None = None) -> tuple[Params, str]:
    """(parameters, SHA-256) of the pretrained base in run directory ``folder``, trained there when absent."""
    return pretrain.weights(cfg, [t.base for t in _kinds().values()], folder, reporter)


def steps(cfg: Config, method: str) -> int:
    """Training steps of a whole run: replay and joint training add rows of the past to every stage."""
    past = {"joint": 1.0, "replay": cfg.replay_ratio, "olora_replay": cfg.replay_ratio}.get(method, 0.0)
    return sum(math.ceil(cfg.steps * (1 + past * before)) for before in range(len(text.KINDS)))


@functools.cache
def _kinds() -> dict[str, text.Text]:
    return {name: text.deal(read()) for name, read in text.KINDS.items()}


def stage(kind: str, documents: Sequence[str], cfg: Config) -> Stage:
    """Rows for ``cfg.steps`` steps, each seen once."""
    pieces = text.excerpts(documents, cfg.window - 1, cfg.steps * cfg.batch_size)
    return Stage(kind, pretrain.rows(kind, pieces, cfg.window), (kind,))


def held_out(kind: str, documents: Sequence[str], cfg: Config) -> Eval:
    """Bits per byte of pieces that are one window each."""
    pieces = text.excerpts(documents, cfg.window - 1, cfg.test_rows)
    items = [{"id": f"{kind}-test-{i}", "text": piece} for i, piece in enumerate(pieces)]
    return text_nll(
        kind, items, pretrain.TOKENIZER, window=cfg.window, batch_size=cfg.test_rows, metric="bits_per_byte"
    )


def _hash(cfg: Config) -> str:
    """Names a base in the cache; texts differ a little between Pythons."""
    return short_hash(pretrain.identity(cfg) | {"python": platform.python_version()})
