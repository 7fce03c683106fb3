"""The train step, compiled ahead from abstract inputs, once per distinct phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcl.core import journal
from jaxcl.core.experiment import Experiment
from jaxcl.core.rows import rows_at
from jaxcl.core.sharding import Placement, replicated_leaves
from jaxcl.core.signals import Compilations
from jaxcl.core.step import make_step
from jaxcl.core.types import Fixed, Phase, State


class StepCache:
    """Compiled steps of a run, by everything that is static: spec, phase, methods, shapes, shardings."""

    def __init__(self, exp: Experiment):
        self.exp = exp
        self.compilations = Compilations()
        self._compiled: dict[Any, Callable] = {}
        self._inits: dict[Any, Callable] = {}

    def with_optimizer(self, state: State, phase: Phase, placement: Placement) -> State:
        """The state with the optimizer's state: fresh, or carried on where the phase says so and the leaves fit.

        What is carried on comes in ``state.opt`` as a flat dict, see `journal.flatten`.
        """
        tx = phase.tx or self.exp.tx
        like = jax.eval_shape(tx.init, state.train)
        if not phase.reset_opt and state.opt:
            fits = {k: v.shape for k, v in journal.flatten(like, "opt").items()}
            if fits == {k: v.shape for k, v in state.opt.items()}:
                opt = placement.put(journal.unflatten_like(like, state.opt, "opt"))
                return State(state.clock, state.train, opt, state.live)
        key = (tx, _shapes(state.train))  # the object itself: an id may be another one's later
        if key not in self._inits:
            self._inits[key] = jax.jit(tx.init, out_shardings=placement.tree(like))
        return State(state.clock, state.train, self._inits[key](state.train), state.live)

    def get(self, state: State, fixed: Fixed, phase: Phase, spec: Any, placement: Placement, batch: Any) -> Callable:
        """``step(state, fixed, batch, seed)``, compiled before the first batch is trained on. State is donated."""
        key = (spec, phase.objective, phase.active, phase.tx or self.exp.tx, _shapes((state, fixed, batch)))
        if key not in self._compiled:
            jitted = jitted_step(self.exp, state, fixed, batch, phase, spec, placement)
            self._compiled[key] = jitted.lower(state, fixed, batch, np.uint32(0)).compile()
        return self._compiled[key]

    def replicated(self, least: int) -> dict[str, int]:
        """{path: bytes} of what any step so far holds whole on every device, from ``least`` bytes on."""
        return {k: v for step in self._compiled.values() for k, v in replicated_leaves(step, least).items()}


def jitted_step(
    exp: Experiment, state: State, fixed: Fixed, batch: Any, phase: Phase, spec: Any, placement: Placement
) -> Any:
    """The phase's ``step(state, fixed, batch, seed)`` under jit, with the shardings that the arguments (arrays, or
    shapes with shardings) have. State is donated."""
    step = make_step(exp.model.apply, spec, exp.methods, exp.tx, phase, exp.accumulate, exp.model.head)

    def train_step(state: State, fixed: Fixed, batch: Any, seed: Any) -> Any:
        with rows_at(placement.rows):
            return step(state, fixed, batch, seed)

    of = lambda tree: jax.tree.map(lambda x: x.sharding, tree)  # noqa: E731
    ins = (of(state), of(fixed), of(batch), placement.replicated)
    return jax.jit(train_step, donate_argnums=0, in_shardings=ins, out_shardings=(of(state), placement.replicated))


def _shapes(tree: Any) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, tuple((np.shape(x), str(x.dtype), str(getattr(x, "sharding", ""))) for x in leaves)
