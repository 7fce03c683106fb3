"""L2-SP: the weights are held near where they started, or where the last stage left them. Card cft/l2-sp.

Li, Grandvalet, Davoine, ICML 2018; annealed as in RecAdam (Chen et al., EMNLP 2020). The loss gets
strength/2 ||theta_S - anchor||^2 + beta/2 ||theta_N||^2, S: matrices that were given, N: matrices that methods made.
Where adapters train, S is what the adapted kernels are: what a LoRA adds to a kernel is held near what it added then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.paths import layer_shape
from jaxcl.core.types import Clock, Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.penalties import half_square_distance, square_of_product

FORMS = ("loss", "decoupled")
ANCHORS = ("start", "previous")


@method
def l2_sp(
    strength: float = 0.01,
    beta: float = 0.01,
    anchor: str = "start",
    form: str = "loss",
    rate: float | None = None,
    anneal: int | None = None,
    slope: float = 0.1,
    name: str = "l2_sp",
) -> Method:
    """Pulls given matrices towards their anchor with ``strength``, new ones towards zero with ``beta``.

    anchor: ``start``, the weights of the run's start (general ability), or ``previous``, those the stage began with.
    form: ``loss`` adds the penalty; under Adam its pull is rescaled entry by entry. ``decoupled`` moves the weights
    after the optimizer: theta <- theta + update - rate * strength * (theta - anchor), theta as before the update, with
    ``rate`` the optimizer's learning rate (under a schedule its peak: the pull has none). anneal: RecAdam, decoupled
    only: with a = sigmoid(slope (step of the phase - anneal)) the update counts by a and the pull by 1 - a; its values
    are strength 5000, slope 0.1 to 0.5, anneal 250, 500 or 1000.

    Vectors are free: norms, biases, HAT's embeddings. The optimizer's own weight decay pulls towards zero as well: set
    it to 0. Usual strengths are 0.001 to 0.1; the paper's beta for vision is 0.01. Raises RequestError for a negative
    strength, beta or anneal, a rate or slope that is not positive, an unknown anchor or form, a decoupled form without
    a rate, anneal in the other.
    """
    if strength < 0 or beta < 0 or slope <= 0 or (anneal is not None and anneal < 0):
        values = f"strength {strength}, beta {beta}, anneal {anneal}, slope {slope}"
        raise RequestError(f"l2_sp: {values}; accepted: slope > 0, the others 0 or more, anneal None")
    for value, known, what in ((anchor, ANCHORS, "anchor"), (form, FORMS, "form")):
        if value not in known:
            raise unknown(what, value, known, where="l2_sp")
    if (form == "decoupled") != (rate is not None) or (rate is not None and rate <= 0):
        wanted = "a positive learning rate with form 'decoupled', else None"
        raise RequestError(f"l2_sp: rate is {rate} with form {form!r}; accepted: {wanted}")
    if anneal is not None and form != "decoupled":
        raise RequestError(f"l2_sp: anneal is {anneal} with form {form!r}; accepted: form 'decoupled'")

    def init(world: World) -> Own:
        return {"fixed": {"anchor": anchors(world, banked=anchor == "start"), "new": zeros_of_new(world)}}

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, {}  # the next stage's anchor is what it begins with, made by `init`

    def penalties(params: Mapping[str, Any], own: Own) -> dict[str, jax.Array]:
        given, new = table(own, "anchor"), table(own, "new")
        named = {"given": strength * distance(params, given)} if strength else {}
        return named | ({"new": beta * half_square_distance(params, new)} if beta and new else {})

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        return penalties(ctx.params, ctx.own)

    def project(updates: Params, params: Params, own: Own, clock: Clock) -> Params:
        def total(trained: Params) -> jax.Array:
            return jnp.asarray(sum(penalties({**params, **trained}, own).values(), 0.0))

        assert rate is not None
        pulls = jax.grad(total)({k: params[k] for k in updates})
        learn = 1.0 if anneal is None else jax.nn.sigmoid(slope * (clock.phase_step.astype(jnp.float32) - anneal))
        pull = 1.0 if anneal is None else 1.0 - learn

        def moved(k: str, u: jax.Array) -> jax.Array:
            a, b = (learn, pull) if k in table(own, "anchor") else (1.0, 1.0)
            return (a * u.astype(jnp.float32) - b * rate * pulls[k].astype(jnp.float32)).astype(u.dtype)

        return {k: moved(k, u) for k, u in updates.items()}

    if not strength and not beta:
        return Method(name=name)
    turn: dict[str, Any] = {"loss": loss} if form == "loss" else {"project": project}
    turn |= {"end": end} if anchor == "previous" else {}
    return Method(name=name, kinds={"anchor": "value", "new": "gradient"}, init=init, **turn)


def table(own: Own, part: str) -> Params:
    """A table of the fixed memory; one that is empty may be gone after a resume."""
    return (own["fixed"] or {}).get(part, {})


def anchors(world: World, banked: bool) -> Params:
    """Matrices of the base that train, and both factors of adapters of which one does; with ``banked`` their kernels as
    well, so that what a stage's end merges into a kernel, or moves into a bank, is still away from the start."""
    given = {k for k in matrices(world) if k not in world.owner}
    where = {k.rpartition("/")[0] for k in world.trained if k.endswith(("/lora_a", "/lora_b"))}
    parts = ("lora_a", "lora_b", *(("kernel",) if banked else ()))
    return {k: world.params[k] for k in sorted(given | {f"{s}/{part}" for s in where for part in parts})}


def zeros_of_new(world: World) -> Params:
    """Zeros like the matrices that methods made, but for the factors of adapters."""
    new = [k for k in matrices(world) if k in world.owner and not k.endswith(("/lora_a", "/lora_b"))]
    return {k: jnp.zeros_like(world.params[k]) for k in new}


def matrices(world: World) -> list[str]:
    """Sorted paths of what trains and has two axes or more in every layer."""
    return [k for k in sorted(world.trained) if len(layer_shape(k, world.params[k])) > 1]


def distance(params: Mapping[str, Any], anchor: Mapping[str, Any]) -> jax.Array:
    """1/2 ||weights - anchor||^2 with all that adapters add to a kernel counted as part of it. f32[]."""
    where = [k.removesuffix("/lora_a") for k in anchor if k.endswith("/lora_a")]
    adapted = {f"{s}/{part}" for s in where for part in ("lora_a", "lora_b", "kernel")}
    total = half_square_distance(params, {k: v for k, v in anchor.items() if k not in adapted})
    for site in (s for s in where if s + "/lora_a" in params):
        kernel = anchor.get(site + "/kernel")
        dense = None if kernel is None else params[site + "/kernel"].astype(jnp.float32) - kernel.astype(jnp.float32)
        total += 0.5 * square_of_product(*factors(params, anchor, site), dense)
    return total


def factors(params: Mapping[str, Any], anchor: Mapping[str, Any], site: str) -> tuple[jax.Array, jax.Array]:
    """([..., out, R], [..., R, in]) of what the adapters add now and did not at the anchor, as differences of factors,
    B A - B' A' = (B - B') A + B' (A - A'), so that nothing but zeros is left where nothing moved."""
    f32 = lambda x: x.astype(jnp.float32)  # noqa: E731
    a, b, scale = (f32(params[f"{site}/lora_{part}"]) for part in ("a", "b", "scale"))
    a0, b0 = f32(anchor[site + "/lora_a"]), f32(anchor[site + "/lora_b"])
    left, right = [scale[..., None, None] * (b - b0), scale[..., None, None] * b0], [a, a - a0]
    if site + "/kernel" in anchor and site + "/bank_b" in params:  # without: folded into the kernel, or banked before
        bank_a, bank_b, scale = (f32(params[f"{site}/bank_{part}"]) for part in ("a", "b", "scale"))
        for slot in range(bank_a.shape[-3]):
            left.append(scale[..., None, None] * bank_b[..., slot, :, :])
            right.append(bank_a[..., slot, :, :])
    return jnp.concatenate(left, -1), jnp.concatenate(right, -2)
