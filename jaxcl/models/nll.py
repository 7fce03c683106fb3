"""Cross-entropy at the targets, in chunks, so that the logits of a large vocabulary never exist in full."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..core.types import Batch


def batch_nll(logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: Batch, chunk: int) -> jax.Array:
    """nll of a batch's targets from ``hidden`` [B,T,D], f32: [B,K] with ``targets_at``, else [B,T]; 0 where there
    is nothing to predict (see `jaxcl.models.decoder.apply`)."""
    at = batch["targets_at"] if "targets_at" in batch else shifted(batch["segments"])
    labels = jnp.take_along_axis(batch["tokens"], jnp.maximum(at, 0), axis=1)
    nll = chunked_nll(logits, hidden, jnp.maximum(at - 1, 0), labels, chunk)
    return jnp.where(at > 0, nll, 0.0)


def chunked_nll(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, at: jax.Array, labels: jax.Array, chunk: int
) -> jax.Array:
    """-log softmax(logits(hidden[b, at[b,k]]))[labels[b,k]], f32[B,K]; hidden [B,T,D], at and labels
    i32[B,K].

    At most ``chunk`` targets (and at least one a row) have logits at a time, in the backward pass too. Chunks
    run along K, so that a batch axis spread over devices stays where it is.
    """
    b, k = at.shape
    width = max(1, chunk // b)

    def part(at: jax.Array, labels: jax.Array) -> jax.Array:
        scores = logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
        picked = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(scores, axis=-1) - picked

    if k <= width:
        return part(at, labels)
    parts = -(-k // width)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, parts * width - k))).reshape(b, parts, width).swapaxes(0, 1)

    again = jax.checkpoint(part)  # the backward pass computes a chunk's logits again instead of keeping them
    nll = jax.lax.map(lambda each: again(*each), (cut(at), cut(labels)))
    return nll.swapaxes(0, 1).reshape(b, parts * width)[:, :k]


def shifted(segments: jax.Array) -> jax.Array:
    """targets_at for every token: i32[B,T], its own index, 0 where it starts a segment or is padding."""
    index = jnp.arange(segments.shape[1])
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((segments > 0) & (segments == before), index, 0)
