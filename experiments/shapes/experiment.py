"""Any method on SmolLM2-135M-Instruct: two stages of real rows, short enough to try a method of any shape in minutes.

    jaxcl run shapes --set method=llama_pro --set 'options={"groups": 6}'
    jaxcl run shapes --set method=finetune
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.til import til
from jaxcl.data.olora import olora_evals, olora_stages
from jaxcl.errors import RequestError
from jaxcl.models.fetch import load
from jaxcl.registry import METHODS, constructor


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: about four minutes on two cores with all weights trained. rows, test_rows null: the full sets."""

    method: str = "llama_pro"
    options: str = "{}"  # of the method's constructor, as a JSON object
    model: str = "smollm2-135m-instruct"
    order: str = "olora/order_1"
    stages: tuple[int, ...] = (3, 0)  # of the order: AG News, then dbpedia
    rows: int | None = 96
    test_rows: int | None = 48
    window: int = 96
    batch_size: int = 8
    epochs: float = 1.0
    learning_rate: float = 1e-4
    seed: int = 0


def build(cfg: Config) -> Experiment:
    """The experiment; weights come from the model cache (`jaxcl fetch`), data from --data or $JAXCL_DATA."""
    chosen = constructor(cfg.method, where="--set method")
    if METHODS[cfg.method]["kind"] == "transform":
        raise RequestError(f"{cfg.method!r} is an optimizer's transform; accepted: a method (jaxcl list methods)")
    try:
        made = chosen(**json.loads(cfg.options))
    except (ValueError, TypeError) as e:
        raise RequestError(f"options={cfg.options}: {e}; accepted: a JSON object of {cfg.method}'s arguments") from e
    data = os.environ.get("JAXCL_DATA")
    model, params, tokenizer, source = load(cfg.model)
    shared: dict[str, Any] = {"window": cfg.window, "template": "plain", "seed": cfg.seed}
    stages = olora_stages(cfg.order, data, tokenizer, rows=cfg.rows, **shared)
    evals = olora_evals(cfg.order, data, tokenizer, rows=cfg.test_rows, batch_size=8, **shared)
    picked = [stages[i] for i in cfg.stages]
    taught = {e for stage in picked for e in stage.evals}
    exp = Experiment(
        model=model,
        params=params,
        source=source,
        stages=picked,
        evals=[e for e in evals if e.id in taught],
        methods=[made],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cfg.learning_rate, weight_decay=0.0)),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        seed=cfg.seed,
        save_every=0,
        tokenizer=tokenizer,
    )
    return til(exp) if cfg.method == "hat" else exp
