"""Where a step's rows live, for the model to say so of its activations.

Where rows and weights share a mesh axis (fsdp), XLA may as well split activations by width and sum them over the
axis, layer by layer; and on a TPU it does. A model that calls `keep_rows` on its residual stream leaves no choice: rows
stay where they are, and the weights of a layer come to them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding

_ROWS: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_at(sharding: NamedSharding) -> Iterator[None]:
    """While a step is traced in it, `keep_rows` means this sharding, whose first axis is that of rows. A function that
    is jitted by itself, inside the step, keeps what it was first traced with."""
    token = _ROWS.set(sharding)
    try:
        yield
    finally:
        _ROWS.reset(token)


def keep_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] with its rows over the mesh as `rows_at` says and no other axis split; as it is outside of it, and
    where the mesh does not divide B."""
    rows = _ROWS.get()
    if rows is None or not rows.spec or rows.spec[0] is None:
        return x
    over = rows.spec[0] if isinstance(rows.spec[0], tuple) else (rows.spec[0],)
    parts = math.prod(rows.mesh.shape[a] for a in over)
    if parts == 1 or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, rows)
