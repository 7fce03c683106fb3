"""Diagonal Fisher information of one row: squared gradients of its log likelihood.

Square per row, then average over rows: squaring the gradient of a mean underestimates by up to the batch size.
``train`` is any pytree of parameters, ``batch`` one row (arrays with a leading axis of 1, see `jaxcl.core.types`);
``forward(train, batch)`` gives what has an ``nll`` like the batch's ``weight``, and `sampled` also asks
``forward.logits(train, outputs, at)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxcl.core.types import Batch


def empirical(forward: Any, train: Any, batch: Batch, key: jax.Array) -> Any:
    """(d log p(gold answer) / d theta)^2, f32 in the shapes of ``train``; log p sums over the answer's tokens."""

    def log_likelihood(train: Any) -> jax.Array:
        return -jnp.sum(jnp.where(batch["weight"] > 0, forward(train, batch).nll, 0.0))

    return _square(jax.grad(log_likelihood)(train))


def sampled(forward: Any, train: Any, batch: Batch, key: jax.Array) -> Any:
    """(d log p(y) / d theta)^2 with y drawn from the model at every answer position, given the gold prefix.

    One draw a row: an unbiased estimate of the true Fisher (Kirkpatrick et al. 2017).
    """
    positions = batch["targets_at"] if "targets_at" in batch else jnp.broadcast_to(
        jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape
    )  # fmt: skip

    def log_likelihood(train: Any) -> jax.Array:
        out = forward(train, {**batch, "targets_at": positions})
        logits = forward.logits(train, out, jnp.maximum(positions - 1, 0)).astype(jnp.float32)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(batch["weight"] > 0, log_p, 0.0))

    return _square(jax.grad(log_likelihood)(train))


def _square(grads: Any) -> Any:
    return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)


ESTIMATES: dict[str, Callable] = {"empirical": empirical, "sampled": sampled}
