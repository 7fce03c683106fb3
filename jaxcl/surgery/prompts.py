"""Soft prompts made, and the network through which they may be trained. Sources: Lester et al. 2021; Razdaibiedina et
al. 2023 for the residual network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Params
from jaxcl.errors import RequestError
from jaxcl.models.prompt import ROWS, produced
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.t5_spec import T5Spec

COMMON = 5000
"""Words from which a prompt is drawn: the most frequent ones, which the tokenizers at hand number first."""


def drawn(spec: Any, params: Params, length: int, words: Sequence[int] | None, key: jax.Array) -> jax.Array:
    """f32[P,D]: rows of the vocabulary as they enter the first layer. ``words``: token ids to begin with, as of class
    labels; the other rows are of words drawn from the first `COMMON`. RequestError for an id outside the vocabulary."""
    for word in words or ():
        if not 0 <= word < spec.vocab:
            raise RequestError(f"token {word} is not in the vocabulary; accepted: 0 to {spec.vocab - 1}")
    many = min(COMMON, spec.vocab)
    ids = jax.random.choice(key, many, (length,), replace=length > many)
    first = jnp.asarray(tuple(words or ())[:length], jnp.int32)
    ids = ids.at[: len(first)].set(first)
    return params["embed/kernel"][ids].astype(jnp.float32) * getattr(spec, "embed_scale", 1.0)


def network(spec: Any, hidden: int, key: jax.Array, silent: bool) -> Params:
    """{prompt/mlp_*}: a fresh network of one hidden layer, weights U(-1/sqrt(in), 1/sqrt(in)); silent: one that adds
    nothing yet, its norm's scale being 0."""
    wide, narrow = (jax.random.fold_in(key, n) for n in range(2))
    uniform: Any = lambda k, shape, n: jax.random.uniform(k, shape, jnp.float32, -(n**-0.5), n**-0.5)  # noqa: E731
    d = spec.width
    return {
        "prompt/mlp_in": uniform(wide, (d, hidden), d),
        "prompt/mlp_in_bias": jnp.zeros(hidden, jnp.float32),
        "prompt/mlp_out": uniform(narrow, (hidden, d), hidden),
        "prompt/mlp_out_bias": jnp.zeros(d, jnp.float32),
        "prompt/mlp_scale": jnp.full(d, 0.0 if silent else 1.0, jnp.float32),
        "prompt/mlp_bias": jnp.zeros(d, jnp.float32),
    }


def collapsed(params: Params) -> Params:
    """{key: new value}: the rows are what the network makes of them, and it adds nothing more. Empty without one."""
    if "prompt/mlp_in" not in params:
        return {}
    silent = {k: jnp.zeros_like(params[k]) for k in ("prompt/mlp_scale", "prompt/mlp_bias")}
    return {ROWS: produced(params), **silent}


def check_room(spec: Any, length: int, tokens: int, name: str) -> None:
    """RequestError for a prompt without rows, one that leaves no room for the tokens (T5 has always some), a model that
    takes none."""
    if not isinstance(spec, DecoderSpec | T5Spec):
        raise RequestError(f"{name}: a {type(spec).__name__} takes no soft prompt; accepted: a DecoderSpec, a T5Spec")
    if length < 1:
        raise RequestError(f"{name}: length is {length}; accepted: a whole number of at least 1")
    if isinstance(spec, DecoderSpec) and length + tokens > spec.context:
        room = spec.context - tokens
        wanted = f"up to {room} (context {spec.context})"
        raise RequestError(f"{name}: a prompt of {length} before rows of {tokens} tokens; accepted: {wanted}")
