"""A step of a large model, to be planned for chips that are not here (`jaxcl plan scale`): random weights and tokens.

    jaxcl plan scale --topology v5e:16x16 --set model=llama3-8b --set method=olora
    jaxcl plan scale --topology v5p:8x8x16 --set model=llama3-70b --set method=lora --suggest
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import optax

from jaxcl.core.experiment import Experiment
from jaxcl.data.encode import Example, encode
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError, unknown
from jaxcl.models.decoder import decoder
from jaxcl.models.known import ON_HUB, T5, repository
from jaxcl.models.spec import DecoderSpec, RopeScaling, tiny
from jaxcl.models.t5 import t5
from jaxcl.models.t5_spec import T5Spec
from jaxcl.registry import METHODS, constructor

LLAMA3: dict[str, Any] = {
    "vocab": 128256, "head_dim": 128, "kv_heads": 8, "rope_theta": 5e5, "tied": False, "context": 131072,
    "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # Sizes: the config.json of meta-llama/Llama-3.1-8B, -70B and Qwen/Qwen3-1.7B.
    "llama3-8b": {**LLAMA3, "width": 4096, "layers": 32, "heads": 32, "mlp": 14336},
    "llama3-70b": {**LLAMA3, "width": 8192, "layers": 80, "heads": 64, "mlp": 28672},
    "qwen3-1.7b": {
        "vocab": 151936, "width": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp": 6144,
        "rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": "head", "context": 40960,
    },
    "tiny": {},
}  # fmt: skip
SPLIT = ("vocab", "embed", "heads", "kv", "mlp")


@dataclasses.dataclass(frozen=True)
class Config:
    """batch_size: rows of a step over all chips. targets: answer tokens of a row; null: every token is a target.
    options: of the method's constructor, as a JSON object. base: type of the weights as they are stored; bfloat16 is
    for frozen ones. mesh: {axis: chips}, -1 for the rest; with ``model`` in it the default rules hold, else the last
    axis splits every tensor along the first dimension that it divides (a short last one is padded to 128 on a TPU)."""

    model: str = "llama3-8b"
    method: str = "olora"
    options: str = "{}"
    batch_size: int = 1024
    window: int = 256
    targets: int | None = 64
    stages: int = 2
    rows: int = 1024
    remat: str = "block"
    accumulate: int = 1
    base: str = "float32"
    compute: str = "bfloat16"
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    learning_rate: float = 1e-4
    seed: int = 0


def spec_of(cfg: Config) -> DecoderSpec | T5Spec:
    """The model's sizes, its layers in one stack. RequestError on an unknown model."""
    kinds: dict[str, Any] = {"dtype": cfg.compute, "param_dtype": cfg.base, "remat": cfg.remat}
    kinds["nll_chunk"] = cfg.batch_size * 128
    name = repository(cfg.model)
    if name in T5:
        sizes = {"vocab": 32128, "head_dim": 64, **T5[name]}
        return T5Spec(**sizes, **kinds, segments=((("block",), sizes["layers"]),))
    if cfg.model not in MODELS:
        raise unknown("model", cfg.model, [*MODELS, *ON_HUB, *T5], where="--set model")
    sizes = MODELS[cfg.model]
    spec = DecoderSpec(**sizes, **kinds) if sizes else tiny(**kinds)
    return dataclasses.replace(spec, segments=((("block",), spec.layers),))


class Tokens:
    """A `Source` of random tokens: rows of a whole window, the last ``targets`` of them the answer."""

    def __init__(self, name: str, cfg: Config, vocab: int):
        self.name, self.cfg, self.vocab = name, cfg, vocab

    def __len__(self) -> int:
        return self.cfg.rows

    def __getitem__(self, i: int) -> Example:
        k = self.cfg.targets or self.cfg.window - 1
        ids = np.random.default_rng([self.cfg.seed, i]).integers(0, self.vocab, self.cfg.window)
        return encode(ids[: len(ids) - k], ids[len(ids) - k :].tolist(), self.cfg.window, k, row=i)

    def label(self, i: int) -> str:
        return self.name

    def record(self, i: int) -> dict[str, Any]:
        return {"id": self.id(i)}

    def id(self, i: int) -> str:
        return f"{self.name}/{i}"


def build(cfg: Config) -> Experiment:
    """The experiment; weights are drawn when it is built, 32 GB of them for llama3-8b in float32."""
    chosen = constructor(cfg.method, where="--set method")
    if METHODS[cfg.method]["kind"] == "transform":
        raise RequestError(f"{cfg.method!r} is an optimizer's transform; accepted: a method (jaxcl list methods)")
    if not 1 <= (cfg.targets or 1) < cfg.window:
        raise RequestError(f"targets={cfg.targets}: accepted: 1 to {cfg.window - 1}, below the window, or null")
    spec = spec_of(cfg)
    model = t5(spec) if isinstance(spec, T5Spec) else decoder(spec)
    return Experiment(
        model=model,
        params=model.init(model.spec, jax.random.key(cfg.seed)),
        source={"random": cfg.model},
        stages=[Stage(f"stage{i}", Tokens(f"stage{i}", cfg, model.spec.vocab)) for i in range(cfg.stages)],
        methods=[chosen(**json.loads(cfg.options))],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cfg.learning_rate, weight_decay=0.0)),
        batch_size=cfg.batch_size,
        accumulate=cfg.accumulate,
        mesh=cfg.mesh,
        rules=None if "model" in cfg.mesh else {"batch": tuple(cfg.mesh), **dict.fromkeys(SPLIT, tuple(cfg.mesh)[-1])},
        seed=cfg.seed,
        save_every=0,
    )
