"""SmolLM2-135M-Instruct learns dbpedia, amazon, yahoo and AG News one after another (O-LoRA's order 1).

Run one of five methods on the same rows and the same LoRA sites (q and v), for example:

    jaxcl run olora_order1 --set method=olora
    jaxcl run olora_order1 --set method=joint --set rows=640

`olora_t5_large` is the same on T5-large with the reference's settings.
"""

from __future__ import annotations

import dataclasses
import os

import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.types import Method
from jaxcl.data.olora import olora_evals, olora_stages
from jaxcl.errors import unknown
from jaxcl.evaluate.general import general_suite
from jaxcl.methods.ewc import ewc
from jaxcl.methods.inclora import inclora
from jaxcl.methods.joint import joint
from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora
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


METHODS = ("lora", "inclora", "olora", "replay", "ewc", "joint")


def methods(cfg: Config) -> list[Method]:
    """The runs that are compared; all but O-LoRA and IncLoRA train one sequential adapter."""
    if cfg.method not in METHODS:
        raise unknown("method", cfg.method, METHODS, where="--set method")
    adapter = {"rank": cfg.rank, "alpha": cfg.alpha, "dropout": cfg.dropout, "targets": list(cfg.targets)}
    if cfg.method == "olora":
        return [olora(**adapter, strength=cfg.strength, norm=cfg.norm)]
    if cfg.method == "inclora":
        return [inclora(**adapter)]
    beside = {
        "lora": [],
        "replay": [replay(ratio=cfg.replay_ratio, capacity=cfg.replay_capacity, seed=cfg.seed)],
        "ewc": [ewc(strength=cfg.ewc_strength, rows=cfg.ewc_rows)],
        "joint": [joint()],
    }
    return [lora(**adapter), *beside[cfg.method]]


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
        evals += general_suite(data, tokenizer, rows=cfg.general, seed=cfg.seed)
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
