"""A new method from scratch: PCGrad between new and replayed rows. Yu et al., NeurIPS 2020, arXiv 2001.06782.

A method is a record of functions for the slots it needs: here what it reads (`plan`), what it does to the gradient
(`grad`) and what it remembers (`init`, `end`). Below it are its rows in the shared tests and a run beside fine-tuning.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from unicode_names import held_out, show, stages

from jaxcl import Budget, Experiment, Method, Phase, Stream, World, decoder, finetune, method, train
from jaxcl.core.progress import Reporter
from jaxcl.methods import memory
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.models.spec import tiny
from jaxcl.transforms.projections import agem as without


@method
def pcgrad(capacity: int = 256, seed: int = 0, name: str = "pcgrad") -> Method:
    """Old and new rows are two tasks: the step is g' + r', their gradients, each without what points against the other.

    g' = g - <g, r> / <r, r> r where <g, r> < 0, else g; r' the same with g and r exchanged. capacity: rows held over
    all stages, a reservoir drawn by ``seed``; as many of them as the batch has new rows come in every step.
    """

    def plan(world: World, own: dict, phases: list[Phase]) -> list[Phase]:
        old = tuple(Stream(stage, rows, into=name) for stage, rows in memory.by_stage(own["host"]).items())
        old = old or (Stream(0, (), into=name),)  # no memory yet: masked rows, so that batches have one shape
        return [dataclasses.replace(p, streams=p.streams + old) for p in phases]

    def grad(grad_fn: Any, own: dict, clock: Any) -> Any:
        def surgery(train: dict, batch: dict, key: jax.Array, *, terms: bool = True) -> tuple:
            if name not in batch:  # another method asks for the gradient of rows of its own
                return grad_fn(train, batch, key, terms=terms)
            g, aux = grad_fn(train, {k: v for k, v in batch.items() if k != name}, key, terms=terms)
            r, _ = grad_fn(train, batch[name], jax.random.fold_in(key, 1), terms=False)
            return jax.tree.map(jnp.add, without(g, r), without(r, g)), aux

        return surgery

    def end(world: World, own: dict) -> tuple[World, dict]:
        return world, memory.remember(world, own, "reservoir", capacity, seed)

    if not capacity:
        return Method(name=name)
    return Method(name=name, keeps=Budget(examples=capacity), init=memory.empty, plan=plan, grad=grad, end=end)


# Its rows in the tests that every method has to pass; see tests/user_methods.py.
ROWS = {"pcgrad": lambda: pcgrad(capacity=8)}
NOTHING = {"pcgrad": lambda: pcgrad(capacity=0)}


def main() -> dict[str, np.ndarray]:
    """{run: losses f64[stages, evals] after each stage}; prints them."""
    found, model = {}, decoder(tiny(layers=1))
    for m in (finetune(), pcgrad()):
        exp = Experiment(
            model=model, params=model.init(model.spec, jax.random.key(0)), stages=stages(range(1, 8)),
            evals=held_out([0]), methods=[m], tx=optax.adam(3e-3), batch_size=16, epochs=5, save_every=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            train(exp, Path(out), reporter=Reporter(quiet=True))
            found[m.name] = read_matrix(Path(out)).rows
        show(m.name, found[m.name])
    return found


if __name__ == "__main__":
    main()
