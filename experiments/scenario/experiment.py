"""Any stream of `jaxcl list streams` with any method, on SmolLM2-135M-Instruct or another model.

    jaxcl run scenario --set stream=intent/clinc150 --set method=replay --set 'options={"capacity": 150}'
    jaxcl evaluate scenario --set stream=ner/types --set general=20
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import jax
import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.types import ALL
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora
from jaxcl.models.decoder import decoder
from jaxcl.models.fetch import load
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.registry import METHODS, constructor
from jaxcl.scenarios import open_stream

ADAPTERS = ("lora", "inclora", "olora")


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: minutes on two cores. rows, test_rows null: the full sets. general: rows of each set of the
    general-ability suite, null: none. keep_all: do not limit what a method holds, as for joint training."""

    stream: str = "olora/order_1"
    settings: str = "{}"  # options of the stream, a JSON object
    order: str = "given"  # or random (by seed), similarity
    allow: tuple[str, ...] = ()  # leaks by name
    method: str = "finetune"
    options: str = "{}"  # of the method's constructor, a JSON object
    adapter: bool = True  # train LoRA (rank, targets below), unless the method brings its own adapters
    model: str = "smollm2-135m-instruct"  # tiny: an untrained byte decoder, to try a stream in seconds
    template: str = "plain"
    rows: int | None = 64
    test_rows: int | None = 32
    general: int | None = None
    window: int = 256
    batch_size: int = 8
    epochs: float = 1.0
    learning_rate: float = 5e-4
    rank: int = 8
    targets: tuple[str, ...] = ("attn/*", "mlp/*")
    keep_all: bool = False
    seed: int = 0
    save_every: int = 50


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise RequestError(f"{where}={text}: {e}; accepted: a JSON object") from e
    if not isinstance(found, dict):
        raise RequestError(f"{where}={text}; accepted: a JSON object")
    return found


def methods(cfg: Config) -> list[Any]:
    chosen = constructor(cfg.method, where="--set method")
    if METHODS[cfg.method]["kind"] == "transform":
        raise RequestError(f"{cfg.method!r} is an optimizer's transform; accepted: a method (jaxcl list methods)")
    try:
        made = chosen(**_object(cfg.options, "options"))
    except TypeError as e:
        raise RequestError(f"options={cfg.options}: {e}; accepted: arguments of {cfg.method}") from e
    if not cfg.adapter or cfg.method in ADAPTERS:
        return [made]
    return [lora(rank=cfg.rank, targets=list(cfg.targets), dropout=0.0), made]


def tried(cfg: Config) -> tuple[Any, Any, Any, dict[str, Any]]:
    """What `load` gives, of a model that knows nothing."""
    model = decoder(tiny(context=4096))
    return model, model.init(model.spec, jax.random.key(cfg.seed)), ByteTokenizer(), {"made by": "chance"}


def build(cfg: Config) -> Experiment:
    """The experiment; weights come from the model cache (`jaxcl fetch`), data from --data or $JAXCL_DATA."""
    chosen, data = methods(cfg), os.environ.get("JAXCL_DATA")
    model, params, tokenizer, source = tried(cfg) if cfg.model == "tiny" else load(cfg.model)
    stream = open_stream(
        cfg.stream,
        tokenizer,
        data_dir=data,
        window=cfg.window,
        rows=cfg.rows,
        test_rows=cfg.test_rows,
        seed=cfg.seed,
        order=cfg.order,
        template=Template(cfg.template),
        batch_size=cfg.batch_size,
        allow=cfg.allow,
        options=_object(cfg.settings, "settings"),
    )
    shared = {"window": cfg.window, "seed": cfg.seed, "batch_size": cfg.batch_size}
    general: list[Any] = []
    if cfg.general:
        from jaxcl.evaluate.general import general_suite

        general = general_suite(data, tokenizer, rows=cfg.general, **shared)
    return stream.experiment(
        model=model,
        params=params,
        source=source,
        methods=chosen,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cfg.learning_rate, weight_decay=0.0)),
        evals=general,
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        seed=cfg.seed,
        save_every=cfg.save_every,
        tokenizer=tokenizer,
        **({"keeps": ALL} if cfg.keep_all or cfg.method == "joint" else {}),
    )
