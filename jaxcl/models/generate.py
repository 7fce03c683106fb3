"""Greedy and sampled generation with a key-value cache: one `lax.while_loop`, one compilation a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.types import Apply, Params
from ..errors import RequestError
from .cache import Cache, extend, prefill

Head = Callable[[Any, Params, jax.Array, jax.Array], jax.Array]


class _Loop(NamedTuple):
    made: jax.Array  # tokens so far
    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    done: jax.Array
    cache: Cache


def generate(
    apply: Apply,
    head: Head,
    spec: Any,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new: int,
    stop_ids: Sequence[int],
    pad: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    key: jax.Array | None = None,
    batch: dict[str, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts i32[B,T], right-padded, of lengths i32[B] -> (tokens i32[B,max_new], lengths i32[B]).

    A row ends with the first of ``stop_ids``, which stays in tokens but is not counted in lengths; after it
    stands ``pad``. temperature 0 is greedy; above it samples with ``key`` from the ``top_k`` most likely tokens
    (0: all; Fan et al. 2018), of these from the smallest set whose probability reaches ``top_p`` (Holtzman et al.
    2020).
    repetition_penalty: logits of tokens that the row holds already, its prompt included, are divided by it where
    positive and multiplied where negative (Keskar et al. 2019), also for greedy. apply and head may be wrapped by
    methods; ``batch`` holds further fields they read, one row each. All keywords but key and batch are static under
    jit. The head runs on the last position only, and the loop ends when every row has ended.
    """
    if temperature > 0.0 and key is None:
        raise RequestError(f"temperature is {temperature} without a key; accepted: 0 or a key")
    prompts, lengths = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    rows, width = prompts.shape
    stops = jnp.array(tuple(stop_ids) or (-1,), jnp.int32)
    extra = batch or {}

    def pick(hidden: jax.Array, at: jax.Array, state: _Loop) -> jax.Array:
        scores = head(spec, params, hidden, at[:, None])[:, 0]
        if repetition_penalty != 1.0:
            scores = jnp.where(held(state, scores.shape[-1]), penalised(scores, repetition_penalty), scores)
        if key is None or temperature == 0.0:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return draw(jax.random.fold_in(key, state.made), scores / temperature, top_p, top_k)

    def held(state: _Loop, vocab: int) -> jax.Array:
        """bool [B,V]: the tokens of the prompt and those made so far."""
        tokens = jnp.concatenate([prompts, state.tokens], axis=1)
        made = jnp.arange(max_new) < state.made
        real = jnp.concatenate([place < lengths[:, None], jnp.broadcast_to(made, (rows, max_new))], axis=1)
        return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].max(real)

    def add(state: _Loop, token: jax.Array) -> _Loop:
        stopped = jnp.any(token[:, None] == stops, axis=1)
        token = jnp.where(state.done, pad, token)
        return state._replace(
            made=state.made + 1,
            tokens=state.tokens.at[:, state.made].set(token),
            lengths=state.lengths + ~(state.done | stopped),
            last=token,
            done=state.done | stopped,
        )

    def step(state: _Loop) -> _Loop:
        one = {
            "tokens": state.last[:, None],
            "segments": (~state.done).astype(jnp.int32)[:, None],
            "positions": (lengths + state.made - 1)[:, None],
        }
        out = extend(apply, spec, params, {**extra, **one}, state.cache, write=True)
        token = pick(out.hidden, jnp.zeros(rows, jnp.int32), state)
        return add(state._replace(cache=out.cache), token)

    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    block = {"tokens": prompts, "segments": (place < lengths[:, None]).astype(jnp.int32), "positions": place}
    out = prefill(apply, spec, params, {**extra, **block}, width + max_new)
    start = _Loop(
        made=jnp.int32(0),
        tokens=jnp.full((rows, max_new), pad, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        done=lengths == 0,
        cache=out.cache,
    )
    state = add(start, pick(out.hidden, jnp.maximum(lengths - 1, 0), start))
    state = jax.lax.while_loop(lambda s: (s.made < max_new) & ~jnp.all(s.done), step, state)
    return state.tokens, state.lengths


def penalised(scores: jax.Array, penalty: float) -> jax.Array:
    """Logits made less likely by a penalty above 1 (Keskar et al. 2019, section 4.1, on both sides of 0)."""
    return jnp.where(scores > 0, scores / penalty, scores * penalty)


def draw(key: jax.Array, scores: jax.Array, top_p: float, top_k: int = 0) -> jax.Array:
    """One token a row, i32[B], from logits f32[B,V], kept to the ``top_k`` most likely (0: all; ties stay), then to the
    nucleus: the most likely tokens whose mass before them is below ``top_p``, so at least one."""
    if 0 < top_k < scores.shape[-1]:
        scores = jnp.where(scores >= jax.lax.top_k(scores, top_k)[0][:, -1:], scores, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)
