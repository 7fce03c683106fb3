"""Synaptic intelligence: importance gathered along the training path, no extra pass. Card cft/si.

Zenke, Poole, Ganguli, ICML 2017. w += -g * step with the step that was really taken; at a stage's end
Omega += max(0, w) / (change^2 + xi); the loss gets c * sum Omega (theta - anchor)^2, without a factor 1/2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.core.types import Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError
from jaxcl.losses.penalties import quadratic


@method
def si(strength: float = 0.1, xi: float = 1e-3, clamp: bool = True, name: str = "si") -> Method:
    """Protects what moved the loss. strength: c, tuned between 0.01 and 1. xi: damping, 1e-3 (CIFAR) or 0.1 (MNIST).

    clamp: path integrals below 0 count as 0 (common code; the original does not). The gradient in the path integral
    is that of the loss without this penalty; penalties of other methods stay in it.
    Raises RequestError for a negative strength, an xi that is not positive.
    """
    if strength < 0 or xi <= 0:
        raise RequestError(f"si: strength {strength}, xi {xi}; accepted: strength >= 0, xi > 0")

    def init(world: World) -> Own:
        trained = {k: world.params[k] for k in sorted(world.trained)}
        zeros = lambda: {k: jnp.zeros_like(v, jnp.float32) for k, v in trained.items()}  # noqa: E731
        return {"fixed": {"omega": zeros(), "anchor": trained}, "live": {"path": zeros()}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        fixed = ctx.own["fixed"]
        return {"penalty": 2.0 * strength * quadratic(ctx.params, fixed["anchor"], fixed["omega"])}

    def observe(ctx: Ctx, grads: Params, updates: Params, params: Params) -> Own:
        fixed, path = ctx.own["fixed"], ctx.own["live"]["path"]
        return {"path": {k: v + step(k, fixed, grads, updates, params) if k in grads else v for k, v in path.items()}}

    def step(k: str, fixed: Own, grads: Params, updates: Params, params: Params) -> jax.Array:
        pull = 2.0 * strength * fixed["omega"][k] * (params[k] - fixed["anchor"][k]).astype(jnp.float32)
        return -(grads[k].astype(jnp.float32) - pull) * updates[k].astype(jnp.float32)

    def end(world: World, own: Own) -> tuple[World, Own]:
        fixed, path = own["fixed"], own["live"]["path"]
        omega = {k: fixed["omega"][k] + gain(w, world.params[k], fixed["anchor"][k]) for k, w in path.items()}
        anchor = {k: world.params[k] for k in path}
        fresh = {k: jnp.zeros_like(w) for k, w in path.items()}
        return world, {"fixed": {"omega": omega, "anchor": anchor}, "live": {"path": fresh}}

    def gain(w: jax.Array, now: jax.Array, before: jax.Array) -> jax.Array:
        change = jnp.square((now - before).astype(jnp.float32))
        return (jnp.maximum(w, 0.0) if clamp else w) / (change + xi)

    kinds = {"omega": "square", "anchor": "value", "path": "square"}
    parts = {"init": init, "loss": loss, "observe": observe, "end": end} if strength else {}
    return Method(name=name, kinds=kinds, **parts)  # type: ignore[arg-type]
