"""An optimisation inside a step: the part of the model above a layer, one row at a time, as often as wanted.

What an edit tries changes nothing below its layer, and nothing before its query where only the query's token is
touched; neither is computed again. T: tokens of a row, K: its target slots, N: tokens of the block that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.core.types import Batch, Ctx, Outputs, Params
from jaxcl.errors import RequestError
from jaxcl.methods.router import query_index


class Upper:
    """The model of ``ctx`` from ``layer`` on. short: the tokens before the query come from a cache."""

    def __init__(self, ctx: Ctx, name: str, layer: int, short: bool):
        self.ctx, self.name, self.layer, self.short = ctx, name, layer, short

    def rows(self, notes: Mapping[str, jax.Array], stream: tuple[str, ...]) -> Batch:
        """The batch, with weight, ``query``, ``output`` and ``stream`` [B,T,D], the input of the layer, of each row.

        notes: what `router.routed` left; stream: the tap of the layer's input, or none below the first. Raises
        RequestError where the batch came in micro-batches, whose taps are sums.
        """
        fields = {k: v for k, v in self.ctx.batch.items() if not isinstance(v, dict)}
        found = {part: notes[f"{self.name}/{part}"] for part in ("query", "output")}
        if len(found["query"]) != len(fields["tokens"]):
            raise RequestError(f"{self.name} looks at every row of a step by itself; set accumulate to 1")
        below = {"stream": self.ctx.out.taps[stream[0]]} if stream else {}
        return {**fields, **found, **below, "weight": self.ctx.weight}

    def call(self, params: Params, row: Batch, cache: Any) -> Outputs:
        start = (self.layer, row["stream"]) if "stream" in row else None
        return self.ctx.model(self.ctx.spec, {**self.ctx.params, **params}, row, cache=cache, start=start)

    def test(self, params: Params, row: Batch) -> tuple[jax.Array, Any]:
        """(whether the most likely tokens after the prompt differ from the row's target, cache for `loss`)."""
        ctx, row = self.ctx, alone(row)
        size = row["tokens"].shape
        out = self.call(params, row, {"valid": jnp.zeros(size, bool)} if self.short else None)
        at = row["targets_at"]
        assert ctx.head is not None
        guess = jnp.argmax(ctx.head(ctx.spec, ctx.params, out.hidden, jnp.maximum(at - 1, 0)), axis=-1)
        wanted = jnp.take_along_axis(row["tokens"], at, axis=1)
        return jnp.any((at > 0) & (guess != wanted)), out.cache

    def loss(self, row: Batch, cache: Any, copies: int) -> Callable[[Params], jax.Array]:
        """params -> the row's weighted mean nll, over ``copies`` of the row as one batch."""
        block = alone(after_query(row) if self.short else row)
        if self.short:  # nothing is written, and the slot that is tried is in use, whatever the router chose before
            cache = {**cache, f"router/{self.name}/slot": jnp.zeros(1, jnp.int32), "read_only": None}
        block, cache = (jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), part) for part in (block, cache))
        weight = block["weight"]

        def loss(params: Params) -> jax.Array:
            nll = self.call(params, block, cache).nll
            return jnp.sum(weight * nll) / jnp.maximum(jnp.sum(weight), 1.0)

        return loss


def alone(row: Batch) -> Batch:
    """One row as a batch."""
    return jax.tree.map(lambda x: x[None], row)


def after_query(row: Batch) -> Batch:
    """One row's tokens from the query on: N = K + 1 of them, padding where the row has fewer."""
    first = query_index(alone(row))[0]
    index = first + jnp.arange(len(row["targets_at"]) + 1)
    fields = [k for k in ("tokens", "segments", "positions", "stream") if k in row]
    cut: Batch = {k: jnp.take(row[k], index, axis=0, mode="fill", fill_value=0) for k in fields}
    return {**row, **cut, "targets_at": jnp.where(row["targets_at"] > 0, row["targets_at"] - first, 0)}


def descend(
    loss: Callable[[jax.Array], jax.Array], value: jax.Array, n_iter: int, lr: float, stop_below: float | None
) -> jax.Array:
    """``value`` after n_iter steps of a fresh Adam, or where the loss is below ``stop_below`` before that."""
    tx = optax.adam(lr)
    bound = -jnp.inf if stop_below is None else stop_below

    def again(state: tuple) -> jax.Array:
        i, _, _, low = state
        return (i < n_iter) & ~low

    def step(state: tuple) -> tuple:
        i, value, opt, _ = state
        now, grad = jax.value_and_grad(loss)(value)
        updates, moments = tx.update(grad, opt)
        low = now < bound
        return i + 1, jnp.where(low, value, value + updates), moments, low

    return jax.lax.while_loop(again, step, (jnp.int32(0), value, tx.init(value), jnp.bool_(False)))[1]
