"""A-GEM: the gradient may not point against the mean gradient of a memory. Card cft/a-gem.

Chaudhry et al., ICLR 2019. The constraint holds for the gradient; what clipping and Adam make of it is theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Budget, Clock, GradFn, Method, Own, Params, Phase, Stream, World, method
from jaxcl.methods import memory
from jaxcl.transforms.projections import agem as project


@method
def agem(capacity: int = 256, policy: str = "reservoir", seed: int = 0, name: str = "agem") -> Method:
    """Projects the gradient by that of the objective alone on a batch drawn from the union of all memories.

    capacity: rows held over all stages (1% of the data is typical). The reference batch has the size of the
    training batch and comes as the stream ``'<name>'``; nothing is computed for it before there is a memory.
    Raises RequestError for a negative capacity, an unknown policy.
    """
    memory.check("agem", policy, capacity=capacity)

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        return [with_reference(p, name, memory.by_stage(own["host"])) for p in phases]

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, memory.remember(world, own, policy, capacity, seed)

    def grad(grad_fn: GradFn, own: Own, clock: Clock) -> GradFn:
        def projected(train: Params, batch: dict[str, Any], key: jax.Array, *, terms: bool = True) -> tuple:
            if name not in batch:  # another method's reference rows: the objective alone
                return grad_fn(train, batch, key, terms=terms)
            main, reference = split_reference(batch, name)
            grads, aux = grad_fn(train, main, key, terms=terms)
            return project(grads, reference_gradient(grad_fn, train, reference, key)), aux

        return projected

    keeps = Budget(examples=capacity)
    return Method(name=name, keeps=keeps, init=memory.empty, plan=plan, end=end, grad=grad if capacity else None)


def with_reference(phase: Phase, into: str, rows: dict[int, Any]) -> Phase:
    """The phase with the memory's rows as streams into ``into``; an empty one, a masked row, where there are none."""
    streams = tuple(Stream(s, r, into=into) for s, r in rows.items()) or (Stream(0, (), into=into),)
    return dataclasses.replace(phase, streams=phase.streams + streams)


def split_reference(batch: dict[str, Any], into: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the batch without the nested stream, the nested stream)."""
    return {k: v for k, v in batch.items() if k != into}, batch[into]


def reference_gradient(grad_fn: GradFn, train: Params, batch: dict[str, Any], key: jax.Array) -> Params:
    """Gradient of the objective alone on ``batch``; zeros, at no cost, where it holds no target."""
    here = jax.random.fold_in(key, 2)
    zeros = lambda: jax.tree.map(jnp.zeros_like, train)  # noqa: E731
    return jax.lax.cond(jnp.any(batch["weight"] > 0), lambda: grad_fn(train, batch, here, terms=False)[0], zeros)
