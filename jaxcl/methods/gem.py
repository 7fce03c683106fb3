"""GEM: the gradient may not point against the gradient of any old stage's memory. Card cft/gem.

Lopez-Paz and Ranzato, NeurIPS 2017. Every memory's gradient is computed anew at the current parameters; the
quadratic program has one variable a past stage and is solved inside the step.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxcl.core.types import Budget, Clock, GradFn, Method, Own, Params, Phase, World, method
from jaxcl.errors import RequestError
from jaxcl.methods import memory
from jaxcl.methods.agem import reference_gradient, split_reference, with_reference
from jaxcl.transforms.projections import gem as project


@method
def gem(
    capacity: int = 256,
    margin: float = 0.5,
    max_stages: int = 4,
    policy: str = "class_balanced",
    seed: int = 0,
    name: str = "gem",
) -> Method:
    """Projects the gradient so that its product with each old stage's is not negative.

    capacity: rows held over all stages. margin: lower bound of the dual variables (0.5 in the reference code, 0 is
    the exact projection). max_stages: streams ``'<name>/<stage>'`` exist for max_stages - 1 past stages; each costs
    a gradient once its stage is over. Raises RequestError for a negative margin or capacity, an unknown policy,
    more stages than max_stages.
    """
    memory.check("gem", policy, capacity=capacity)
    if margin < 0 or max_stages < 2:
        raise RequestError(f"gem: margin {margin}, max_stages {max_stages}; accepted: margin >= 0, max_stages >= 2")
    slots = [f"{name}/{s}" for s in range(max_stages - 1)]

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        if world.stage >= max_stages:
            raise RequestError(f"gem: stage {world.stage + 1} exceeds max_stages={max_stages}; raise it")
        held = memory.by_stage(own["host"])
        for s, slot in enumerate(slots):
            phases = [with_reference(p, slot, {s: held[s]} if s in held else {}) for p in phases]
        return phases

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, memory.remember(world, own, policy, capacity, seed)

    def grad(grad_fn: GradFn, own: Own, clock: Clock) -> GradFn:
        def projected(train: Params, batch: dict[str, Any], key: jax.Array, *, terms: bool = True) -> tuple:
            if slots[0] not in batch:  # another method's reference rows: the objective alone
                return grad_fn(train, batch, key, terms=terms)
            references = []
            for slot in slots:
                batch, reference = split_reference(batch, slot)
                references.append(reference_gradient(grad_fn, train, reference, key))
            grads, aux = grad_fn(train, batch, key, terms=terms)
            return project(grads, references, margin), aux

        return projected

    keeps = Budget(examples=capacity)
    return Method(name=name, keeps=keeps, init=memory.empty, plan=plan, end=end, grad=grad if capacity else None)
