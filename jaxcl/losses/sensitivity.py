"""How sensitive a model's output is to each parameter: |d ||F(x)||^2 / d theta| of one row (Aljundi et al. 2018, MAS).

Absolute value per row, then average over rows: gradients of two rows that point against each other must not cancel.
``train`` is any pytree of parameters, ``batch`` one row (arrays with a leading axis of 1, see `jaxcl.core.types`);
``forward`` as `jaxcl.core.types.Tools` describes it. No target's token is looked at but as context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcl.losses.positions import prompt_end

if TYPE_CHECKING:
    from jaxcl.core.types import Batch


def hidden(forward: Any, train: Any, batch: Batch, key: jax.Array) -> Any:
    """F(x): the residual stream behind the last layer at the last token of the prompt (of plain text: of the row).

    Before the last norm: behind it every state has the same length but for the norm's scale, and nothing is left to
    be sensitive. Of an encoder-decoder it is the decoder's, at its first place. f32 in the shapes of ``train``; the
    row's answer has no part in it.
    """
    encodes = getattr(forward.spec, "encodes", False)
    tap = f"{'decoder/' if encodes else ''}layers/{forward.spec.layers - 1}:out"

    def size(train: Any) -> jax.Array:
        x = forward(train, batch, taps=(tap,)).taps[tap]
        return jnp.sum(jnp.square(x[0, 0 if encodes else prompt_end(batch)[0]].astype(jnp.float32)))

    return _absolute(jax.grad(size)(train))


def logits(forward: Any, train: Any, batch: Batch, key: jax.Array) -> Any:
    """F(x): the logits before every target; of an answer of several tokens all but the first see the gold prefix."""
    positions = batch["targets_at"] if "targets_at" in batch else jnp.broadcast_to(
        jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape
    )  # fmt: skip

    def size(train: Any) -> jax.Array:
        scores = forward.logits(train, forward(train, batch), jnp.maximum(positions - 1, 0)).astype(jnp.float32)
        return jnp.sum(jnp.where(batch["weight"] > 0, jnp.sum(jnp.square(scores), axis=-1), 0.0))

    return _absolute(jax.grad(size)(train))


def _absolute(grads: Any) -> Any:
    return jax.tree.map(lambda g: jnp.abs(g.astype(jnp.float32)), grads)


OUTPUTS: dict[str, Callable] = {"hidden": hidden, "logits": logits}
