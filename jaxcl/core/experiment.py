"""What an experiment file builds: model, weights, stages, evals, methods, optimizer, and how to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from jaxcl.core.types import ALL, Budget, Method, Model, Params, Phase
from jaxcl.errors import RequestError, unknown


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run. ``build(cfg)`` of an experiment file returns this; the loop needs nothing else.

    model, params: the architecture and its initial weights; ``source`` says where they come from (JSON; a
    ``sha256`` identifies them). stages: objects with ``name``, ``train`` (a Source) and ``evals`` (ids that the
    stage teaches). evals: what is measured before the first and after every stage. epochs: passes over a stage's
    rows; steps: or a fixed number of steps. accumulate: micro-batches a step. mesh: {axis: size}, rules:
    {logical axis: mesh axis, or several}. save_every: steps between checkpoints (0: only between phases). keep: past
    stages whose checkpoints stay. reset_opt: whether each stage starts with a fresh optimizer. pack: rows that may
    share a sequence. row0: whether the model is measured before training. phases: a stage's phases before the
    methods plan (default: one, ``train``, on the stage's own rows). keeps: what of past stages a method may hold, where
    the scenario limits it (`jaxcl.scenarios`).
    """

    model: Model
    params: Params
    stages: Sequence[Any]
    methods: Sequence[Method]
    tx: optax.GradientTransformation
    evals: Sequence[Any] = ()
    batch_size: int = 8
    epochs: float = 1.0
    steps: int | None = None
    seed: int = 0
    accumulate: int = 1
    mesh: Mapping[str, int] | None = None
    rules: Mapping[str, str | Sequence[str]] | None = None
    save_every: int = 50
    log_every: int = 1
    keep: int = 2
    reset_opt: bool = True
    pack: int = 1
    row0: bool = True
    phases: Sequence[Phase] = ()
    keeps: Budget = ALL
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Any = None

    def check(self) -> None:
        """Raises RequestError for what no run could be made of."""
        if not self.stages:
            raise RequestError("the experiment has no stages; give at least one")
        names = [s.name for s in self.stages]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise RequestError(f"two stages are named {twice[0]!r}; names must differ")
        ids = [e.id for e in self.evals]
        for stage in self.stages:
            for e in stage.evals:
                if e not in ids:
                    raise unknown("eval", e, ids, where=f"stage {stage.name!r}")
        for name, value in (("batch_size", self.batch_size), ("accumulate", self.accumulate), ("pack", self.pack)):
            if value < 1:
                raise RequestError(f"{name} is {value}; accepted: a whole number of at least 1")
        if self.batch_size % self.accumulate:
            raise RequestError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        for m in self.methods:
            if not m.keeps.within(self.keeps):
                raise RequestError(
                    f"method {m.name!r} keeps {m.keeps} of past stages; this scenario allows {self.keeps}"
                )
            if self.pack > 1 and not m.packs:
                raise RequestError(f"method {m.name!r} works on whole sequences; set pack to 1 (it is {self.pack})")
            for stage in () if m.packs else self.stages:
                if getattr(stage.train, "packs", False):
                    raise RequestError(
                        f"method {m.name!r} works on whole sequences; stage {stage.name!r} has several in a row, "
                        "its text must not be separate"
                    )
