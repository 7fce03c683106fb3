"""Which tokens of a row are meant: the end of its prompt, those before its targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxcl.core.types import Batch


def prompt_end(batch: Batch) -> jax.Array:
    """i32[B]: the last token of a row's prompt, the one before its first target; of a row of plain text, which has no
    ``targets_at``, its last token. 0 for a row without any."""
    width = batch["tokens"].shape[1]
    if "targets_at" not in batch:
        return jnp.max(jnp.where(batch["segments"] > 0, jnp.arange(width), 0), axis=1).astype(jnp.int32)
    first = jnp.min(jnp.where(batch["weight"] > 0, batch["targets_at"], width), axis=1)
    return jnp.where(first < width, jnp.maximum(first - 1, 0), 0).astype(jnp.int32)


def before(batch: Batch) -> jax.Array:
    """i32[B,K]: positions whose logits predict the targets."""
    if "targets_at" in batch:
        return jnp.maximum(batch["targets_at"] - 1, 0)
    positions = jnp.arange(batch["tokens"].shape[1]) - 1
    return jnp.broadcast_to(jnp.maximum(positions, 0), batch["tokens"].shape)
