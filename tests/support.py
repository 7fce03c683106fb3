"""A two-layer decoder, stages of random questions and answers, and short ways to run methods on them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxcl.core.experiment import Experiment
from jaxcl.core.loop import Loop
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.til import til
from jaxcl.core.types import Method, Model
from jaxcl.data.encode import Example, encode
from jaxcl.data.stage import Stage
from jaxcl.models.cache import extend, prefill
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.models.spec import DecoderSpec, tiny
from jaxcl.models.stacking import restack
from jaxcl.models.t5 import t5
from jaxcl.models.t5_spec import T5Spec

SPEC = tiny(vocab=32, layers=2, width=16, heads=2, kv_heads=1, mlp=32, context=64)
MODEL = decoder(SPEC)
forward = jax.jit(MODEL.apply, static_argnums=0, static_argnames=("taps", "train"))
"""The decoder in one program: operation by operation, as a plain call has it, takes ten times as long to compile."""


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new", "stop_ids", "temperature"))
def written(spec: Any, params: dict, prompts: Any, lengths: Any, **how: Any) -> tuple:
    """`generate` of the decoder in one program."""
    return generate(MODEL.apply, MODEL.head, spec, params, prompts, lengths, **how)


@functools.partial(jax.jit, static_argnums=(0, 3))
def filled(spec: Any, params: dict, batch: dict, size: int) -> dict:
    """The cache that `prefill` makes of prompts."""
    return prefill(MODEL.apply, spec, params, batch, size).cache


@functools.partial(jax.jit, static_argnums=0)
def asked(spec: Any, params: dict, block: dict, cache: dict) -> Any:
    """`extend` of a block that is not kept."""
    return extend(MODEL.apply, spec, params, block, cache, write=False)
STACK = ((("block",), 2),)  # both layers under one key
WINDOW, TARGETS = 12, 3
TOLD = {"hat", "progressive_prompts"}  # methods that have to be told the task, beside those whose `per_task` says so


class Answers:
    """A `Source`: prompts of 3 to 8 random tokens, an answer of 1 to 3 tokens that the first one decides."""

    def __init__(self, name: str, n: int = 16, seed: int = 0):
        rng = np.random.default_rng([seed, 7])
        self.name, self.n = name, n
        table = rng.integers(0, SPEC.vocab, (SPEC.vocab, TARGETS))
        self.prompts = [rng.integers(0, SPEC.vocab, rng.integers(3, 9)) for _ in range(n)]
        self.answers = [table[p[0]][: 1 + p[0] % TARGETS] for p in self.prompts]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        return encode(self.prompts[i].tolist(), self.answers[i].tolist(), WINDOW, TARGETS, row=i)

    def label(self, i: int) -> str:
        return f"{self.name}-{len(self.answers[i])}"

    def record(self, i: int) -> dict[str, Any]:
        return {"id": self.id(i), "prompt": self.prompts[i].tolist(), "answer": self.answers[i].tolist()}

    def id(self, i: int) -> str:
        return f"{self.name}/{i}"


def stages(n: int = 3, rows: int = 16) -> list[Stage]:
    return [Stage(f"s{i}", Answers(f"s{i}", rows, seed=i)) for i in range(n)]


def model_of(spec: Any) -> Model:
    return t5(spec) if isinstance(spec, T5Spec) else decoder(spec)


def weights(spec: Any = SPEC) -> dict[str, jax.Array]:
    """The initial weights; the same numbers however the spec stacks its layers."""
    return model_of(spec).init(spec, jax.random.key(0))


def experiment(
    methods: Sequence[Method], *, n: int = 3, rows: int = 16, spec: Any = SPEC, **kw: Any
) -> Experiment:
    """Three stages of sixteen rows on one device; every field of Experiment may be given."""
    kw = {"tx": optax.adam(3e-3), "batch_size": 8, "save_every": 0, "mesh": {"data": 1}, "stages": stages(n, rows)} | kw
    kw.setdefault("params", weights(spec))
    exp = Experiment(model=model_of(spec), methods=methods, **kw)
    by_task = [m for m in methods if m.hparams.get("per_task") and not m.hparams.get("router")]
    return til(exp) if by_task or TOLD & {m.name for m in methods} else exp


@dataclasses.dataclass
class Done:
    """What a run left: the loop, its final weights, and the log's records."""

    loop: Loop
    params: dict[str, np.ndarray]
    log: list[dict[str, Any]]
    out: Path

    @property
    def compilations(self) -> int:
        return self.loop.compiled.compilations.by_name.get("train_step", 0)

    def losses(self, stage: int | None = None) -> np.ndarray:
        return np.array([r["loss"] for r in self.log if stage is None or r["stage"] == stage])


def run(methods: Sequence[Method], out: Path, **kw: Any) -> Done:
    """Trains the methods in a new directory ``out``."""
    loop = train(experiment(methods, **kw), out, reporter=Reporter(quiet=True))
    assert loop is not None, f"{out} was finished already"
    return Done(loop, to_numpy(loop.now.world.params), read_log(out), out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def unstacked(params: dict, spec: DecoderSpec) -> dict[str, np.ndarray]:
    return to_numpy(restack(params, spec, spec.unstacked)[0])


def digest(params: dict) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for k in sorted(params):
        a = np.ascontiguousarray(params[k])
        found.update(f"{k} {a.shape} {a.dtype}".encode() + a.tobytes())
    return found.hexdigest()


def same(a: dict, b: dict) -> bool:
    """Whether two dicts of arrays are equal bit for bit."""
    return digest(a) == digest(b)


def relative(a: dict, b: dict) -> float:
    """The largest relative difference in norm over all tensors."""
    assert a.keys() == b.keys()
    norm = np.linalg.norm
    return max(float(norm(np.ravel(a[k] - b[k])) / max(norm(np.ravel(b[k])), 1e-12)) for k in a)
