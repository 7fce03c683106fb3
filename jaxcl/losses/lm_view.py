"""A row of prompt and answer as one text that a language model can write by itself.

LAMOL (Sun et al. 2020, section 3.1): ``[START] prompt MARK answer``, all of it predicted but START. Suffix letters: B
rows, T tokens of the window, K targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch


def lm_view(batch: Batch, start: jax.Array, mark: jax.Array) -> Batch:
    """The batch with rows START prompt MARK answer, of T + 2 tokens, so that a row that fills its window loses nothing.

    batch: tokens i32[B,T], targets_at i32[B,K] at the row's end; an answer keeps the end mark it has. start i32[B],
    mark i32[]. A row without targets (a masked one) comes out as padding. No ``targets_at``: all is predicted.
    """
    tokens, at = batch["tokens"], batch["targets_at"]
    width = tokens.shape[1]
    count = jnp.sum(at > 0, axis=1, keepdims=True)
    prompt = jnp.min(jnp.where(at > 0, at, width), axis=1, keepdims=True)
    place = jnp.broadcast_to(jnp.arange(width + 2), (tokens.shape[0], width + 2))
    source = jnp.clip(place - 1 - (place > prompt + 1), 0, width - 1)
    made = jnp.take_along_axis(tokens, source, axis=1)
    made = jnp.where(place == prompt + 1, mark, jnp.where(place == 0, start[:, None], made))
    real = (place < prompt + count + 2) & (count > 0)
    rest = {k: v for k, v in batch.items() if k not in ("targets_at", "weight")}
    return {**rest, "tokens": made, "segments": real.astype(jnp.int32), "positions": jnp.where(real, place, 0)}


def lm_loss(nll: jax.Array, view: Batch, mark: jax.Array, special: float) -> jax.Array:
    """Weighted mean nll f32[B,T+2] of all tokens of a view but the first, f32[]; MARK weighs ``special``, others 1.

    The divisor is the sum of weights, as in a weighted cross-entropy.
    """
    said = (view["segments"] > 0) & (view["positions"] > 0)
    weight = jnp.where(said, jnp.where(view["tokens"] == mark, special, 1.0), 0.0)
    return jnp.sum(weight * nll) / jnp.maximum(jnp.sum(weight), 1.0)
