"""What T5 reads of a row: the same rows as a decoder's, cut where the answer begins.

A row stays one sequence, prompt and answer, with ``targets_at`` naming the answer's tokens. The tokens before the first
target are the source; the targets are what the decoder writes. The decoder's input at the place of token t is token t,
and at the place of the last source token it is ``spec.start``, so `hidden` at place t predicts token t + 1, as in a
decoder. In the encoder the place of the first target, which is free there, holds ``spec.end``, T5's end mark of a
source. So all that speaks of places (nll, logits, rollouts, values, label ranking, caches) means the same for both
architectures, and rows need nothing of their own. Packed rows stay apart by their segments.

A row's targets stand one behind another, as everything in `jaxcl.data` makes them. Shapes: B rows, T tokens, K targets.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.types import Batch
from ..errors import RequestError
from .prompt import Prompt

PLAIN = (
    "T5 reads rows of a prompt and an answer, plain text has no source; accepted: rows with targets, such as text with "
    "spans cut out (jaxcl.data.span_corruption)"
)


class Side(NamedTuple):
    """What one stack reads: tokens i32[B,T], segments i32[B,T] (0: padding), positions i32[B or 1,T]."""

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array


def sides(batch: Batch, start: int, end: int | None) -> tuple[Side, Side]:
    """(source [B,T], targets [B,K]) of a batch with ``targets_at``. Unused slots of a target are padding.

    Positions are places, for both: only differences within a segment count. RequestError for plain text.
    """
    if "targets_at" not in batch:
        raise RequestError(PLAIN)
    tokens, segments, at = batch["tokens"], batch["segments"], batch["targets_at"]
    index = jnp.arange(tokens.shape[1])[None]
    mine = jnp.where(at > 0, taken(segments, at), 0)
    first = first_target(segments, mine, at)
    read = jnp.where(index < first, segments, 0)
    given = jnp.where(at == taken(first, at), start, taken(tokens, at - 1))
    if end is not None:
        read, tokens = jnp.where(index == first, segments, read), jnp.where(index == first, end, tokens)
    return Side(tokens, read, index), Side(given, mine, jnp.arange(at.shape[1])[None])


def first_target(segments: jax.Array, mine: jax.Array, at: jax.Array) -> jax.Array:
    """i32[B,T]: for each token the place of its segment's first target, T where the segment has none. mine: the
    segments of the targets ``at``, 0 for unused slots."""
    own = (segments[:, :, None] == mine[:, None, :]) & (segments > 0)[:, :, None]
    return jnp.min(jnp.where(own, at[:, None, :], segments.shape[1]), axis=2)


def prompts(batch: Batch, end: int | None) -> tuple[Side, jax.Array]:
    """(source [B,T] or [B,T+1] with the end mark, lengths of the prompts i32[B]) where the whole batch is prompts."""
    tokens, segments = batch["tokens"], (batch["segments"] > 0).astype(jnp.int32)
    length = jnp.sum(segments, axis=1)
    if end is not None:
        tokens, segments = (jnp.pad(x, ((0, 0), (0, 1))) for x in (tokens, segments))
        here = (jnp.arange(tokens.shape[1]) == length[:, None]) & (length > 0)[:, None]
        tokens, segments = jnp.where(here, end, tokens), jnp.where(here, 1, segments)
    return Side(tokens, segments, jnp.arange(tokens.shape[1])[None]), length


def behind(prompt: Prompt, source: Side, packed: bool) -> Side:
    """The source with a soft prompt before it: segments and positions [B,P+T], the tokens as they are.

    The encoder reads both ways, so the prompt is of a row's one segment. RequestError for packed rows.
    """
    if packed:
        raise RequestError("T5's encoder would read packed rows together through a soft prompt; accepted: pack 1")
    segments = jnp.concatenate([prompt.valid.astype(source.segments.dtype), source.segments], axis=1)
    after = jnp.sum(prompt.valid, axis=1, dtype=jnp.int32)[:, None] + source.positions
    return Side(source.tokens, segments, jnp.concatenate([prompt.positions(), after], axis=1))


def placed(hidden: jax.Array, at: jax.Array, width: int) -> jax.Array:
    """Hidden states [B,K,D] of the targets at their places [B,T,D], each before its own token; zeros elsewhere."""
    b, _, d = hidden.shape
    where = jnp.where(at > 0, at - 1, width)
    return jnp.zeros((b, width, d), hidden.dtype).at[jnp.arange(b)[:, None], where].set(hidden, mode="drop")


def taken(rows: jax.Array, at: jax.Array) -> jax.Array:
    """[B,K] of rows [B,T] at i32[B,K]; what is below 0 counts as 0."""
    return jnp.take_along_axis(rows, jnp.maximum(at, 0), axis=1)
