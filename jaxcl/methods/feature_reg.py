"""Feature regularization: hidden states stay near those of the last stage's model. Card cft/feature-regularization.

The loss gets strength * mean over layers of a distance between the model's features and its teacher's, on the new rows,
the replayed ones (another method's `plan` brings them), or both. Cosine on one pooled feature a row is the feature
distillation of SCKD (Wang et al., Findings of ACL 2023). IDBR, which has heads of its own, is `idbr`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Method, Outputs, Own, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.features import DISTANCES
from jaxcl.losses.positions import before, prompt_end
from jaxcl.methods.lwf import ROWS, snapshot

POSITIONS = ("all", "answers", "last", "mean")
NORMED = -1  # the number of the hidden state behind the last norm


@method
def feature_reg(
    strength: float = 1.0,
    distance: str = "cosine",
    layers: Sequence[int] = (NORMED,),
    positions: str = "all",
    rows: str = "all",
    name: str = "feature_reg",
) -> Method:
    """Adds strength * distance(features, features of the teacher), from the second stage on.

    distance: ``l2`` (||s - t||^2 / D), ``cosine`` (1 - cos, free of scale) or ``relational`` (Gram matrices of unit
    features, free of rotations too). layers: numbers from 0, the residual stream behind each; -1 is the last hidden
    state behind the final norm, which every model has. Under ``l2`` a few outlying dimensions of the upper residual
    stream of a decoder outweigh all others: use cosine, or -1. positions: ``all`` tokens, those before the ``answers``'
    tokens, the ``last`` of the prompt, or the ``mean`` over a row's tokens; an encoder-decoder has last hidden states
    before the answers' tokens alone. rows: ``new``, ``old`` or ``all``.

    The teacher is the trained parameters as they were at the end of the last stage (with adapters only those) and
    runs beside the student, under the same dropout. strength 1 is SCKD's. Raises RequestError for a negative strength,
    no layer or one below -1, unknown distance, positions or rows.
    """
    if strength < 0:
        raise RequestError(f"feature_reg: strength is {strength}; accepted: 0 or more")
    if not layers or min(layers) < NORMED:
        raise RequestError(f"feature_reg: layers is {list(layers)}; accepted: numbers from 0, or -1 for the last state")
    for value, known, what in (
        (distance, tuple(DISTANCES), "distance"), (positions, POSITIONS, "positions"), (rows, ROWS, "rows")
    ):  # fmt: skip
        if value not in known:
            raise unknown(what, value, known, where="feature_reg")
    taps = tuple(f"layers/{i}:out" for i in sorted({*layers} - {NORMED}))
    measure: Callable = DISTANCES[distance]

    def kept(world: World) -> Own:
        return {"fixed": {"teacher": snapshot(world)}}

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, kept(world)

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        new = (ctx.batch["stage"] == ctx.clock.stage)[:, None]
        wanted = {"new": new, "old": ~new, "all": jnp.ones_like(new)}[rows] & (ctx.batch["stage"] >= 0)[:, None]

        def away() -> jax.Array:
            params = jax.lax.stop_gradient({**ctx.params, **ctx.own["fixed"]["teacher"]})
            taught = ctx.model(ctx.spec, params, ctx.batch, taps=taps, train=True, key=ctx.out_key)
            total = jnp.zeros((), jnp.float32)
            for layer in layers:
                student, mask = at(positions, states(ctx.out, layer), ctx.batch, ctx.weight)
                teacher, _ = at(positions, states(taught, layer), ctx.batch, ctx.weight)
                total += measure(student, teacher, mask & wanted)
            return total / len(layers)

        # One compilation, and no teacher to pay for, in the first stage.
        return {"distance": strength * jax.lax.cond(ctx.clock.stage > 0, away, lambda: jnp.zeros((), jnp.float32))}

    whole = positions in ("last", "mean")  # of a row, which then may not share its sequence
    parts: dict[str, Any] = {"init": kept, "loss": loss, "end": end, "taps": taps} if strength else {}
    return Method(name=name, kinds={"teacher": "value"}, packs=not whole, **parts)


def states(out: Outputs, layer: int) -> jax.Array:
    """[B,T,D]: the hidden states behind a layer, or behind the last norm."""
    return out.hidden if layer == NORMED else out.taps[f"layers/{layer}:out"]


def at(positions: str, x: jax.Array, batch: Batch, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(features [B,P,D], mask bool[B,P]) of hidden states [B,T,D] at the positions asked for; padding never counts."""
    valid = batch["segments"] > 0
    if positions == "all":
        return x, valid
    if positions == "answers":
        where = before(batch)
        return jnp.take_along_axis(x, where[..., None], axis=1), weight > 0
    if positions == "last":
        return jnp.take_along_axis(x, prompt_end(batch)[:, None, None], axis=1), jnp.any(valid, axis=1, keepdims=True)
    total = jnp.sum(jnp.where(valid[..., None], x.astype(jnp.float32), 0.0), axis=1, keepdims=True)
    count = jnp.sum(valid, axis=1)[:, None, None]
    return total / jnp.maximum(count, 1), jnp.any(valid, axis=1, keepdims=True)
