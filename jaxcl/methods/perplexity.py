"""The perplexity router of AdapterCL (Madotto et al. 2021): whose adapter is least surprised by a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Outputs, Params
from jaxcl.methods.router import query_index

Under = Callable[..., Outputs]
"""(spec, params, batch, task i32[B], ..) -> Outputs of rows under these tasks' adapters."""


def least_surprised(under: Under, spec: Any, params: Params, batch: Batch, tasks: jax.Array) -> jax.Array:
    """i32[B]: the task, of the ``tasks`` learned, under which a row's prompt has the least nll. One forward pass each.

    The prompt ends before the first target, so that no answer is looked at; all tasks' nll is of the same tokens, so
    the least sum is the least perplexity. The first of equals wins.
    """
    index = jnp.arange(batch["tokens"].shape[1])
    prompt = (index <= query_index(batch)[:, None]).astype(jnp.float32)
    whole = {k: v for k, v in batch.items() if k != "targets_at"}
    rows = len(batch["tokens"])

    def one(task: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, chosen = best
        nll = under(spec, params, whole, jnp.full(rows, task, jnp.int32)).nll
        surprise = jnp.sum(prompt * nll, axis=1)
        lower = surprise < least
        return jnp.where(lower, surprise, least), jnp.where(lower, task, chosen)

    start = (jnp.full(rows, jnp.inf, jnp.float32), jnp.full(rows, -1, jnp.int32))
    return jax.lax.fori_loop(0, tasks, one, start)[1]
