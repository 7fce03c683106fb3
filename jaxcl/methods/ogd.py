"""OGD: the gradient may not move the outputs of past tasks, to first order. Card cft/ogd.

Farajtabar, Azizan, Mott, Li, AISTATS 2020, with the logit of the right answer (OGD-GTL), as in the code of Abbana
Bennani et al. 2020. At a stage's end gradients of the model's outputs, not of the loss, enter an orthonormal basis;
later gradients are freed of it. No rows are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Clock, GradFn, Method, Own, Params, World, method
from jaxcl.errors import RequestError
from jaxcl.losses.distillation import masked_mean
from jaxcl.transforms.orthogonal import empty, extend, outside, slots


@method
def ogd(rows: int = 100, exact: bool = False, max_stages: int = 4, grow: bool = True, name: str = "ogd") -> Method:
    """Projects the gradient out of the span of d f_c / d theta of ``rows`` rows of every past stage.

    f_c: the mean logit of a row's answer tokens. The basis has a copy of all that trains for each row, so train
    adapters. exact: the optimizer's final update is projected too; without it only plain SGD keeps the promise,
    because momentum of an earlier task, Adam and weight decay bring the directions back. max_stages: the basis has room
    for rows * max_stages directions; beyond that it doubles with one new compilation, or, without ``grow``, a stage
    more is refused. List it behind methods that let the model grow. Raises RequestError for negative rows, max_stages
    below 1.
    """
    if rows < 0 or max_stages < 1:
        raise RequestError(f"ogd: rows {rows}, max_stages {max_stages}; accepted: rows >= 0, max_stages >= 1")

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if world.stage >= max_stages and not grow:
            raise RequestError(f"ogd: stage {world.stage + 1} exceeds max_stages={max_stages}; raise it or let it grow")
        if own and world.edits:  # a surgery leaves directions that are not orthonormal
            return world, own | {"fixed": anew(own["fixed"], slots(own["fixed"]["basis"]))}
        return world, own or {}

    def init(world: World) -> Own:
        basis = empty({k: world.params[k] for k in sorted(world.trained)}, rows * max_stages)
        return {"fixed": {"basis": basis, "count": jnp.zeros((), jnp.int32)}}

    def end(world: World, own: Own) -> tuple[World, Own]:
        needed, room = rows * (world.stage + 1), slots(own["fixed"]["basis"])
        fixed = anew(own["fixed"], room if needed <= room else max(needed, 2 * room))
        for i, batch in enumerate(world.tools.batches(world.stage, rows)):
            new = world.tools.call(gold_gradients, batch, jax.random.fold_in(world.key, i))
            lacks = {k: jnp.zeros((len(batch["row"]), *u.shape[1:])) for k, u in fixed["basis"].items() if k not in new}
            fixed = extended(fixed, {**new, **lacks})
        return world, {"fixed": fixed}

    def grad(grad_fn: GradFn, own: Own, clock: Clock) -> GradFn:
        def projected(train: Params, batch: Batch, key: jax.Array, *, terms: bool = True) -> tuple:
            grads, aux = grad_fn(train, batch, key, terms=terms)
            return outside(grads, own["fixed"]["basis"]), aux

        return projected

    def project(updates: Params, params: Params, own: Own, clock: Clock) -> Params:
        return outside(updates, own["fixed"]["basis"])

    parts: dict[str, Any] = {"begin": begin, "init": init, "end": end, "grad": grad} if rows else {}
    parts |= {"project": project} if exact and rows else {}
    return Method(name=name, kinds={"basis": "gradient"}, **parts)


def gold_gradients(forward: Any, train: Params, batch: Batch, key: jax.Array) -> Params:
    """{path: f32[B, *shape]}: the gradient of the mean gold logit of every row, by itself; zeros for padding."""

    def one(row: Batch) -> Params:
        row = jax.tree.map(lambda x: x[None], row)
        every = jnp.broadcast_to(jnp.arange(row["tokens"].shape[1]), row["tokens"].shape)
        where = row.get("targets_at", every)
        gold = jnp.take_along_axis(row["tokens"], where, axis=1)

        def logit(train: Params) -> jax.Array:
            scores = forward.logits(train, forward(train, row), jnp.maximum(where - 1, 0)).astype(jnp.float32)
            return masked_mean(jnp.take_along_axis(scores, gold[..., None], axis=-1)[..., 0], row["weight"] > 0)

        real = (row["row"][0] >= 0).astype(jnp.float32)
        return jax.tree.map(lambda g: real * g.astype(jnp.float32), jax.grad(logit)(train))

    return jax.lax.map(one, batch)


@jax.jit
def extended(fixed: dict[str, Any], vectors: Params) -> dict[str, Any]:
    """The memory with the directions of N vectors f32[N, *shape] added."""
    basis, count = extend(fixed["basis"], fixed["count"], vectors)
    return {"basis": basis, "count": count}


def anew(fixed: dict[str, Any], room: int) -> dict[str, Any]:
    """The memory with its directions orthonormalised once more, in ``room`` slots."""
    like = {k: u[0] for k, u in fixed["basis"].items()}
    return extended({"basis": empty(like, room), "count": jnp.zeros((), jnp.int32)}, fixed["basis"])
