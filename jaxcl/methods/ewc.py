"""Elastic weight consolidation with a diagonal Fisher. Card cft/ewc.

Kirkpatrick et al. 2017 (per-stage anchors), Schwarz et al. 2018 (online), and the running mean of PyContinual.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl.core.paths import per_tensor
from jaxcl.core.types import Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.fisher import ESTIMATES
from jaxcl.losses.penalties import quadratic

MODES = ("online", "separate", "mean")


@method
def ewc(
    strength: float = 400.0,
    mode: str = "online",
    gamma: float = 1.0,
    fisher: str = "empirical",
    rows: int | None = 256,
    normalize: bool = False,
    clip: float | None = None,
    max_stages: int = 8,
    name: str = "ewc",
) -> Method:
    """Adds strength/2 * sum_i F_i (theta_i - anchor_i)^2 over the trained parameters.

    mode: ``online`` keeps F <- gamma F + F_t and the last anchor; ``separate`` every stage's F and anchor (capacity
    max_stages - 1); ``mean`` the running mean of the F. fisher: ``empirical`` (gold answers) or ``sampled`` (answers
    drawn from the model). rows: of the stage, for the estimate (None: all; 200 to 1000 are usual). normalize:
    F_t scaled to mean 1 per tensor. clip: entries of F_t above it are cut, against strength * F * lr > 1.
    strength 400 is TRACE's, with its factor 1/2; PyContinual uses 5000.
    Raises RequestError for a negative strength, gamma outside [0, 1], an unknown mode or estimate.
    """
    if strength < 0:
        raise RequestError(f"ewc: strength is {strength}; accepted: 0 or more")
    if not 0 <= gamma <= 1:
        raise RequestError(f"ewc: gamma is {gamma}; accepted: 0 to 1")
    if mode not in MODES:
        raise unknown("mode", mode, MODES, where="ewc")
    if fisher not in ESTIMATES:
        raise unknown("fisher", fisher, ESTIMATES, where="ewc")
    if rows is not None and rows < 1:
        raise RequestError(f"ewc: rows is {rows}; accepted: a whole number of at least 1, or None for all")
    estimate: Callable = ESTIMATES[fisher]
    slots: tuple[int, ...] = (max(max_stages - 1, 1),) if mode == "separate" else ()

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if mode == "separate" and world.stage >= max_stages:
            raise RequestError(f"ewc: stage {world.stage + 1} exceeds max_stages={max_stages}; raise it")
        return world, own or {}

    def init(world: World) -> Own:
        trained = sorted(world.trained)
        zeros = {k: jnp.broadcast_to(none(world.params[k]), slots + world.params[k].shape) for k in trained}
        anchor = {k: jnp.broadcast_to(world.params[k], slots + world.params[k].shape) for k in trained}
        return {"fixed": {"fisher": zeros, "anchor": anchor}, "host": {"stages": 0}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        fixed = ctx.own["fixed"]
        return {"penalty": strength * quadratic(ctx.params, fixed["anchor"], fixed["fisher"])}

    def end(world: World, own: Own) -> tuple[World, Own]:
        fresh = world.tools.mean(estimate, rows, world.key)
        fresh = {k: per_tensor(lambda f: shaped(f, normalize, clip), k, f) for k, f in fresh.items()}
        t, old = own["host"]["stages"], own["fixed"]
        fixed: dict[str, Params] = {"fisher": {}, "anchor": {}}
        for k in old["fisher"]:
            f = fresh[k] if k in fresh else none(world.params[k])
            anchor = world.params[k]
            if mode == "separate":  # past the capacity, after the last stage, nothing is written
                fixed["fisher"][k] = old["fisher"][k].at[t].set(f, mode="drop")
                fixed["anchor"][k] = old["anchor"][k].at[t].set(anchor, mode="drop")
            else:
                fixed["fisher"][k] = accumulate(old["fisher"][k], f, mode, gamma, t)
                fixed["anchor"][k] = anchor
        return world, {"fixed": fixed, "host": {"stages": t + 1}}

    kinds = {"fisher": "square", "anchor": "value"}
    watch = begin if mode == "separate" else None
    term = loss if strength else None
    return Method(name=name, begin=watch, init=init, loss=term, end=end, kinds=kinds)


def none(x: jax.Array) -> jax.Array:
    """The Fisher of what was never trained: f32 zeros on the devices that hold ``x``."""
    return jnp.zeros_like(x, jnp.float32)


def accumulate(old: jax.Array, new: jax.Array, mode: str, gamma: float, t: int) -> jax.Array:
    """gamma * old + new (``online``), or the mean of t old estimates and a new one (``mean``)."""
    return gamma * old + new if mode == "online" else (new + t * old) / (t + 1)


def shaped(f: jax.Array, normalize: bool, clip: float | None) -> jax.Array:
    """A Fisher tensor scaled to mean 1 and cut at ``clip``, as asked."""
    if normalize:
        f = f / jnp.maximum(jnp.mean(f), jnp.finfo(jnp.float32).tiny)
    return f if clip is None else jnp.minimum(f, clip)
