"""Soft prompts: learned rows that stand before the tokens of a batch (Lester et al. 2021).

``prompt/rows`` f32[P,D], or [B,P,D], each batch row its own; they enter the first layer as they are. With
``prompt/valid`` bool[B,P] only some of them are there. Where the model is given a batch without a cache, or fills one,
its sequence is P longer inside: the rows that are there have positions 0, 1, ..., the tokens' positions follow, and
every segment of a packed row sees them. Later blocks find them in the cache. What goes in and comes out keeps the
tokens' positions.

In T5 the prompt stands before the source, see `jaxcl.models.t5_rows.behind`.

``prompt/mlp_*``: P = P0 + LayerNorm(W2 relu(W1 P0)) in place of P0 (Razdaibiedina et al. 2023, with a residual).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.types import Batch, Params
from ..errors import RequestError
from .cache import Cache

ROWS, VALID = "prompt/rows", "prompt/valid"


class Prompt(NamedTuple):
    """rows [B,P,D], and which of them are there, bool [B,P]."""

    rows: jax.Array
    valid: jax.Array

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def positions(self) -> jax.Array:
        """i32[B,P], of the rows that are there in turn."""
        return jnp.maximum(jnp.cumsum(self.valid, axis=1, dtype=jnp.int32) - 1, 0)

    def seen(self, block: jax.Array) -> jax.Array:
        """bool [B,P+T,P+T] from the tokens' own [B,T,T]: a token that is no padding sees all rows that are there."""
        b, t, _ = block.shape
        causal = self.valid[:, :, None] & self.valid[:, None, :] & jnp.tril(jnp.ones((self.length,) * 2, bool))
        real = jnp.diagonal(block, axis1=1, axis2=2)
        above = jnp.concatenate([causal, jnp.zeros((b, self.length, t), bool)], axis=2)
        below = jnp.concatenate([real[:, :, None] & self.valid[:, None, :], block], axis=2)
        return jnp.concatenate([above, below], axis=1)


def prompt_of(params: Mapping[str, jax.Array], rows: int, dtype: Any) -> Prompt | None:
    """The prompt that ``params`` hold for a batch of so many rows, or None."""
    if ROWS not in params:
        return None
    own = produced(params).astype(dtype)
    own = jnp.broadcast_to(own, (rows, *own.shape[-2:]))
    return Prompt(own, params.get(VALID, jnp.ones(own.shape[:2], bool)))


def produced(params: Mapping[str, jax.Array]) -> jax.Array:
    """The prompt's rows [..., P, D], through its network where it has one."""
    rows = params[ROWS]
    if "prompt/mlp_in" not in params:
        return rows
    w: Params = {k.removeprefix("prompt/mlp_"): v for k, v in params.items() if k.startswith("prompt/mlp_")}
    hidden = jax.nn.relu(rows @ w["in"] + w["in_bias"])
    made = hidden @ w["out"] + w["out_bias"]
    centred = made - jnp.mean(made, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-5)
    return rows + normed * w["scale"] + w["bias"]


def with_room(
    prompt: Prompt, batch: Batch, cache: Cache | None, context: int
) -> tuple[Batch, Cache | None, Prompt | None]:
    """(batch, cache, the prompt if it is in the block): positions and room for the tokens behind the prompt.

    Of the batch only segments and positions are changed: [B,P+T] where the prompt is in the block. Raises RequestError
    where prompt and tokens are more than ``context``.
    """
    after = jnp.sum(prompt.valid, axis=1, dtype=jnp.int32)[:, None] + batch["positions"]
    if cache is not None and any(name.endswith("/k") for name in cache):
        return {**batch, "positions": after}, cache, None
    total = prompt.length + batch["tokens"].shape[1]
    if total > context:
        raise RequestError(f"prompt and tokens are {total} positions; accepted: up to {context} (context)")
    segments = jnp.concatenate([prompt.valid.astype(jnp.int32), batch["segments"]], axis=1)
    positions = jnp.concatenate([prompt.positions(), after], axis=1)
    if cache is not None:
        cache = {**cache, "valid": jnp.pad(cache["valid"], ((0, 0), (0, prompt.length)))}
    return {**batch, "segments": segments, "positions": positions}, cache, prompt
