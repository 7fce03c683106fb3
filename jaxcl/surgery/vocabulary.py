"""New rows of the vocabulary: added closed, opened where they are meant to be said, cut off again.

A closed row can be read (it has an embedding) but never said: the frozen parameter ``vocab_bias`` f32[V], 0 for open
rows and `CLOSED` for closed ones, is added to the logits. So the old rows' logits are what they were, the new ones'
probability is exactly 0, labels are ranked and answers written as before, and all tokens that a run will need can be
made before its first step: one compilation serves every stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.types import Params, World
from jaxcl.errors import RequestError
from jaxcl.surgery.edit import Edit, Origin, operated

BIAS = "vocab_bias"
CLOSED = -1e9
"""Its exp is exactly 0 in float32, as that of -inf; but 0 * (CLOSED - CLOSED) is 0, where -inf gives NaN (in a KL)."""
ALIGNED = 128  # a vocabulary divisible by a power of two stays so, up to this one: what was sharded stays sharded


def grow(world: World, n: int) -> World:
    """The world with at least ``n`` closed rows behind its vocabulary; new values by ``world.key``. Memories follow by
    the Edit: a Fisher is zero there, an anchor is the new value."""
    return operated(world, *growth(world.spec, world.params, n, world.key))


def growth(spec: Any, params: Params, n: int, key: jax.Array, spread: float = 0.1) -> tuple[Any, Edit]:
    """(spec, Edit) of ``n`` new rows of ``embed/kernel`` [V,D] and, untied, columns of ``head/kernel`` [D,V], all
    closed; a few more where `ALIGNED` asks for it.

    A new row is the mean of the old ones (Hewitt 2021: its logit is no outlier) plus ``spread`` of their standard
    deviation, so that new tokens differ. Raises RequestError for a model without a vocabulary, n < 1.
    """
    if "embed/kernel" not in params or not hasattr(spec, "vocab"):
        raise RequestError("this model has no vocabulary that could grow; accepted: a decoder with 'embed/kernel'")
    if n < 1:
        raise RequestError(f"{n} new rows of the vocabulary; accepted: at least 1")
    step = min(ALIGNED, spec.vocab & -spec.vocab)
    n = -(-n // step) * step
    index = np.append(np.arange(spec.vocab), np.full(n, -1))
    moved, fills = {}, {}
    for i, (path, axis) in enumerate((("embed/kernel", -2), ("head/kernel", -1))):
        if path in params:
            new = drawn(params[path], n, axis, jax.random.fold_in(key, i), spread)
            ahead = [(spec.vocab, 0) if a == axis else (0, 0) for a in (-2, -1)]
            moved[path] = Origin(((path, None),), 2, index={axis: index}, fill=jnp.pad(new, ahead))
    if BIAS in params:
        moved[BIAS] = Origin(((BIAS, None),), 1, index={-1: index}, fill=CLOSED)
    else:
        fills[BIAS] = jnp.where(index < 0, CLOSED, 0.0).astype(jnp.float32)
    return dataclasses.replace(spec, vocab=spec.vocab + n), Edit(fills, moved=moved, born=frozenset(fills))


def drawn(kernel: jax.Array, n: int, axis: int, key: jax.Array, spread: float) -> jax.Array:
    """``n`` new entries along ``axis``, from the right: its mean plus noise of ``spread`` standard deviations."""
    old = kernel.astype(jnp.float32)
    mean, std = old.mean(axis, keepdims=True), old.std(axis, keepdims=True)
    shape = tuple(n if a - kernel.ndim == axis else size for a, size in enumerate(kernel.shape))
    return (mean + spread * std * jax.random.normal(key, shape)).astype(kernel.dtype)


def opened(params: Params, row: Any) -> Params:
    """``params`` in which row ``row`` (traced or not) of the vocabulary can be said."""
    return {**params, BIAS: params[BIAS].at[row].set(0.0)}


def cut(spec: Any, params: Params, vocab: int) -> tuple[Params, Any]:
    """(params, spec) with the first ``vocab`` rows alone, as before `grow`: exact for every token below ``vocab``,
    since closed rows have no probability. For export. RequestError where a row behind them is open."""
    if not 1 <= vocab <= spec.vocab or bool(jnp.any(params[BIAS][vocab:] > CLOSED)):
        raise RequestError(f"cut after {vocab} of {spec.vocab} rows; accepted: up to where only closed rows follow")
    out = {k: v for k, v in params.items() if k != BIAS}
    out["embed/kernel"] = params["embed/kernel"][:vocab]
    if "head/kernel" in params:
        out["head/kernel"] = params["head/kernel"][:, :vocab]
    if bool(jnp.any(params[BIAS][:vocab] != 0)):
        out[BIAS] = params[BIAS][:vocab]
    return out, dataclasses.replace(spec, vocab=vocab)
