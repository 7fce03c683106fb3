"""What `jaxcl bench` can measure: experiments on rows of random ids, each beside a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxcl.core.between import Between
from jaxcl.core.experiment import Experiment
from jaxcl.core.types import Method, Model, Params
from jaxcl.data.encode import Example, encode
from jaxcl.data.stage import Rows, Stage
from jaxcl.errors import unknown
from jaxcl.registry import constructor
from jaxcl.transforms.mofo import mofo

EVERY_SITE = ("attn/*", "mlp/*")
KEYS = 1000  # of GRACE's codebook
BANK = 15  # adapters of O-LoRA's full bank
RATE = 1e-4


class Setting(NamedTuple):
    """The model and the shape of a batch, shared by both sides. targets: answer tokens a row."""

    model: Model
    params: Params
    rows: int
    window: int
    targets: int


class Side(NamedTuple):
    """One row of the table. base: what is trained, ``full`` or LoRA at some sites, and the plain step beside it.
    stage: where it is measured. first: whether the same method's first stage is the other side instead of the base.
    forward: whether a forward pass is measured instead of a step."""

    name: str
    method: str
    base: str
    stage: int = 1
    options: Mapping[str, Any] = {}
    forward: bool = False
    first: bool = False


_LORA = {"rank": 8, "alpha": 32.0, "dropout": 0.0}
BASES: dict[str, tuple[str, ...] | None] = {"full": None, "lora": EVERY_SITE, "lora q v": ("attn/q", "attn/v")}
_BANKS = {**_LORA, "max_stages": BANK + 1}
SIDES = (
    *(Side(f"{m}, {base}", m, base, options=o) for m, o in (
        ("replay", {"capacity": 64}), ("ewc", {"rows": 2}), ("si", {}), ("lwf", {}), ("agem", {"capacity": 64}),
        ("rho1", {"reference": None}),
    ) for base in ("lora", "full")),
    Side("mofo, full", "mofo", "full", 0),
    Side("olora, q v, bank of 15", "olora", "lora q v", BANK, {"targets": BASES["lora q v"]}),
    Side("olora, bank of 15", "olora", "lora", BANK, {"targets": EVERY_SITE}),
    Side("olora, bank of 15 folded", "olora", "lora", BANK, {"targets": EVERY_SITE, "fold": True}),
    Side("olora, stage 16 against 1", "olora", "lora q v", BANK, {"targets": BASES["lora q v"]}, first=True),
    Side(f"grace, {KEYS} keys, forward", "grace", "full", 0, {"capacity": 1024}, forward=True),
)  # fmt: skip


def chosen(methods: tuple[str, ...], bases: tuple[str, ...]) -> list[Side]:
    """The sides of these methods on these bases, all where none is given. RequestError for a name that has none."""
    known, trained = {s.method for s in SIDES}, {s.base for s in SIDES}
    for name in methods:
        if name not in known:
            raise unknown("method", name, known, where="--method")
    for name in bases:
        if name not in trained:
            raise unknown("base", name, trained, where="--base")
    return [s for s in SIDES if (not methods or s.method in methods) and (not bases or s.base in bases)]


def plain(base: str, at: Setting, forward: bool = False) -> Experiment:
    """What a side on ``base`` is compared with: full fine-tuning with AdamW, or one adapter."""
    return experiment(at, [] if forward else trained_by(base), adamw(), stages=1)


def of(side: Side, at: Setting) -> Experiment:
    """The side's experiment, with the stages that it takes to get to where it is measured."""
    stages = side.stage + 1
    if side.method == "mofo":
        return experiment(at, [], optax.chain(optax.clip_by_global_norm(1.0), mofo(RATE)), stages)
    options = {**(_BANKS if side.method == "olora" else {}), **side.options}
    made = constructor(side.method)(**options)
    alone = side.method in ("olora", "grace")  # their own adapters, or a model that does not train
    return experiment(at, [made] if alone else [*trained_by(side.base), made], adamw(), stages)


def trained_by(base: str) -> list[Method]:
    targets = BASES[base]
    return [] if targets is None else [constructor("lora")(**_LORA, targets=targets)]


def adamw() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))


def experiment(at: Setting, methods: list[Method], tx: optax.GradientTransformation, stages: int) -> Experiment:
    return Experiment(
        model=at.model, params=at.params, stages=[Stage(f"s{i}", random_rows(at, i)) for i in range(stages)],
        methods=methods, tx=tx, batch_size=at.rows, mesh={"data": 1},
    )  # fmt: skip


def random_rows(at: Setting, stage: int) -> Rows:
    """A stage of eight batches: rows of random ids that fill the window, the last ``targets`` of each the answer."""
    ids = np.random.default_rng([stage, 5]).integers(3, at.model.spec.vocab, (8 * at.rows, at.window))
    cut = at.window - at.targets

    def row(i: int) -> Example:
        return encode(ids[i, :cut], ids[i, cut:].tolist(), at.window, at.targets, row=i)

    return Rows(f"s{stage}", [{"id": str(i)} for i in range(len(ids))], row, lambda record: "all")


def filled(now: Between, keys: int = KEYS) -> None:
    """Fills GRACE's codebook with random keys of radius 1, too far from anything to be hit."""
    live = now.owns["grace"]["live"]
    book = dict(live["book"])
    rng = np.random.default_rng(0)
    for part in ("keys", "values"):
        book[part] = book[part].at[:keys].set(rng.normal(size=(keys, book[part].shape[1])).astype(np.float32))
    book |= {"eps": book["eps"].at[:keys].set(1.0), "n": book["n"] + keys}
    live["book"] = jax.tree.map(now.placement.put, book)

