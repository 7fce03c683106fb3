"""SmolLM2-135M-Instruct learns dbpedia, amazon, yahoo and AG News one after another (O-LoRA's order 1).

Run one of these methods on the same rows, beside LoRA at the same sites (q and v) where it is no adapter itself:

    jaxcl run olora_order1 --set method=olora
    jaxcl run olora_order1 --set method=joint --set rows=640

`olora_t5_large` is the same on T5-large with the reference's settings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.types import Method
from jaxcl.data.olora import olora_evals, olora_stages
from jaxcl.errors import unknown
from jaxcl.evaluate.general import general_suite
from jaxcl.methods.agem import agem
from jaxcl.methods.bottleneck import bottleneck
from jaxcl.methods.ewc import ewc
from jaxcl.methods.feature_reg import feature_reg
from jaxcl.methods.ia3 import ia3
from jaxcl.methods.inclora import inclora
from jaxcl.methods.inflora import inflora
from jaxcl.methods.joint import joint
from jaxcl.methods.lora import lora
from jaxcl.methods.lora_experts import lora_experts
from jaxcl.methods.lwf import lwf
from jaxcl.methods.mas import mas
from jaxcl.methods.mir import mir
from jaxcl.methods.ogd import ogd
from jaxcl.methods.olora import olora
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.methods.replay import replay
from jaxcl.models.fetch import load
from jaxcl.models.stacking import restack


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: ten to fifteen minutes on two cores (joint: twenty). rows, test_rows null: the full sets, for a GPU."""

    method: str = "olora"
    model: str = "smollm2-135m-instruct"
    order: str = "olora/order_1"
    rows: int | None = 240  # training rows a stage, drawn by seed
    test_rows: int | None = 64  # test rows an eval, drawn by seed
    window: int = 128  # tokens; longer inputs lose their end, never the question or the answer
    general: int | None = None  # rows of each set of general ability (`jaxcl.evaluate.general`), null: not measured
    general_sets: tuple[str, ...] | None = None  # these sets only
    template: str = "plain"
    prefix: bool = False  # the reference's Task:/Dataset: lines, which leak the task's identity
    by: str = "ranking"  # or generation: exact match of what the model writes, the reference's
    eval_batch: int = 8
    batch_size: int = 8
    accumulate: int = 1  # micro-batches of a step
    epochs: float = 1.0
    learning_rate: float = 1e-3  # the reference's, constant
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("attn/q", "attn/v")
    strength: float = 0.5  # O-LoRA's lambda 1
    norm: str = "l1"
    replay_ratio: float = 0.1  # of each old stage
    replay_capacity: int = 4096
    ewc_strength: float = 400.0
    ewc_rows: int = 64
    dtype: str = "float32"
    remat: str = "none"
    stacked: bool = False  # all layers under one key: a deep model compiles as fast as a shallow one
    seed: int = 0
    mesh: dict[str, int] | None = None
    save_every: int = 50


ADAPTERS: dict[str, Callable[[Config, dict[str, Any]], Method]] = {
    "inclora": lambda cfg, adapter: inclora(**adapter),
    "olora": lambda cfg, adapter: olora(**adapter, strength=cfg.strength, norm=cfg.norm),
    "inflora": lambda cfg, adapter: inflora(rank=cfg.rank, targets=adapter["targets"], stages=4, rows=64),
    "ia3": lambda cfg, adapter: ia3(),
    "prompt_tuning": lambda cfg, adapter: prompt_tuning(length=20),
    "bottleneck": lambda cfg, adapter: bottleneck(),
    "lora_experts": lambda cfg, adapter: lora_experts(max_experts=4),
}
BESIDE: dict[str, Callable[[Config], list[Method]]] = {
    "lora": lambda cfg: [],
    "replay": lambda cfg: [replay(ratio=cfg.replay_ratio, capacity=cfg.replay_capacity, seed=cfg.seed)],
    "mir": lambda cfg: [mir(candidates=2, capacity=cfg.replay_capacity, seed=cfg.seed)],
    "agem": lambda cfg: [agem(capacity=cfg.replay_capacity, seed=cfg.seed)],
    "ogd": lambda cfg: [ogd(rows=cfg.ewc_rows)],
    "ewc": lambda cfg: [ewc(strength=cfg.ewc_strength, rows=cfg.ewc_rows)],
    "mas": lambda cfg: [mas(rows=cfg.ewc_rows)],
    "lwf": lambda cfg: [lwf()],
    "feature_reg": lambda cfg: [feature_reg()],
    "joint": lambda cfg: [joint()],
}


def methods(cfg: Config) -> list[Method]:
    """The runs that are compared: an adapter, or a method beside one LoRA that goes through all stages."""
    adapter = {"rank": cfg.rank, "alpha": cfg.alpha, "dropout": cfg.dropout, "targets": list(cfg.targets)}
    if cfg.method in ADAPTERS:
        return [ADAPTERS[cfg.method](cfg, adapter)]
    if cfg.method not in BESIDE:
        raise unknown("method", cfg.method, [*ADAPTERS, *BESIDE], where="--set method")
    return [lora(**adapter), *BESIDE[cfg.method](cfg)]


def build(cfg: Config) -> Experiment:
    """The experiment; weights come from the model cache (`jaxcl fetch`), data from --data or $JAXCL_DATA."""
    chosen = methods(cfg)
    data = os.environ.get("JAXCL_DATA")
    model, params, tokenizer, source = load(cfg.model)
    model = model._replace(spec=dataclasses.replace(model.spec, dtype=cfg.dtype, remat=cfg.remat))
    if cfg.stacked:
        params, spec = restack(params, model.spec, ((("block",), model.spec.layers),))
        model = model._replace(spec=spec)
    shared = {"window": cfg.window, "template": cfg.template, "prefix": cfg.prefix, "seed": cfg.seed}
    evals = olora_evals(cfg.order, data, tokenizer, rows=cfg.test_rows, batch_size=cfg.eval_batch, by=cfg.by, **shared)
    if cfg.general is not None:
        evals += general_suite(data, tokenizer, rows=cfg.general, seed=cfg.seed, which=cfg.general_sets)
    return Experiment(
        model=model,
        params=params,
        source=source,
        stages=olora_stages(cfg.order, data, tokenizer, rows=cfg.rows, **shared),
        evals=evals,
        methods=chosen,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cfg.learning_rate, weight_decay=0.0)),
        batch_size=cfg.batch_size,
        accumulate=cfg.accumulate,
        epochs=cfg.epochs,
        seed=cfg.seed,
        mesh=cfg.mesh,
        save_every=cfg.save_every,
        tokenizer=tokenizer,
    )
