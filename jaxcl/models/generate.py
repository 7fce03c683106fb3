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


class Written(NamedTuple):
    """Where the writing of a batch stands, all on the device: made i32[] tokens a row so far, tokens i32[B,max_new],
    lengths i32[B] without the stop, last i32[B], done bool[B], and the cache."""

    made: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    done: jax.Array
    cache: Cache


class Writing:
    """One batch that is being continued; the arguments are those of `generate`. `start` runs the prompts, `on` writes
    further, so that a caller may look at the texts in between and set rows ``done``."""

    def __init__(
        self,
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
    ):
        if temperature > 0.0 and key is None:
            raise RequestError(f"temperature is {temperature} without a key; accepted: 0 or a key")
        self.apply, self.head, self.spec, self.params = apply, head, spec, params
        self.prompts, self.starts = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
        self.max_new, self.pad, self.temperature, self.penalty = max_new, pad, temperature, repetition_penalty
        self.stops = jnp.array(tuple(stop_ids) or (-1,), jnp.int32)
        self.top_p, self.top_k, self.key, self.extra = top_p, top_k, key, batch or {}

    def start(self) -> Written:
        """After the prompts and the first token."""
        rows, width = self.prompts.shape
        place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
        inside = (place < self.starts[:, None]).astype(jnp.int32)
        block = {**self.extra, "tokens": self.prompts, "segments": inside, "positions": place}
        out = prefill(self.apply, self.spec, self.params, block, width + self.max_new)
        empty = Written(
            made=jnp.int32(0),
            tokens=jnp.full((rows, self.max_new), self.pad, jnp.int32),
            lengths=jnp.zeros(rows, jnp.int32),
            last=jnp.zeros(rows, jnp.int32),
            done=self.starts == 0,
            cache=out.cache,
        )
        return self._add(empty, self._pick(out.hidden, jnp.maximum(self.starts - 1, 0), empty))

    def on(self, state: Written, until: jax.Array | int) -> Written:
        """Up to ``until`` tokens a row, at most max_new, or until every row is done."""
        most = jnp.minimum(until, self.max_new)
        return jax.lax.while_loop(lambda s: (s.made < most) & ~jnp.all(s.done), self._step, state)

    def _step(self, state: Written) -> Written:
        one = {
            "tokens": state.last[:, None],
            "segments": (~state.done).astype(jnp.int32)[:, None],
            "positions": (self.starts + state.made - 1)[:, None],
        }
        out = extend(self.apply, self.spec, self.params, {**self.extra, **one}, state.cache, write=True)
        token = self._pick(out.hidden, jnp.zeros_like(self.starts), state)
        return self._add(state._replace(cache=out.cache), token)

    def _pick(self, hidden: jax.Array, at: jax.Array, state: Written) -> jax.Array:
        scores = self.head(self.spec, self.params, hidden, at[:, None])[:, 0]
        if self.penalty != 1.0:
            scores = jnp.where(self._held(state, scores.shape[-1]), penalised(scores, self.penalty), scores)
        if self.key is None or self.temperature == 0.0:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return draw(_folded(self.key, state.made), scores / self.temperature, self.top_p, self.top_k)

    def _held(self, state: Written, vocab: int) -> jax.Array:
        """bool [B,V]: the tokens of the prompt and those made so far."""
        rows, width = self.prompts.shape
        tokens = jnp.concatenate([self.prompts, state.tokens], axis=1)
        made = jnp.arange(self.max_new) < state.made
        prompt = jnp.arange(width) < self.starts[:, None]
        real = jnp.concatenate([prompt, jnp.broadcast_to(made, (rows, self.max_new))], axis=1)
        return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].max(real)

    def _add(self, state: Written, token: jax.Array) -> Written:
        stopped = jnp.any(token[:, None] == self.stops, axis=1)
        token = jnp.where(state.done, self.pad, token)
        return state._replace(
            made=state.made + 1,
            tokens=state.tokens.at[:, state.made].set(token),
            lengths=state.lengths + ~(state.done | stopped),
            last=token,
            done=state.done | stopped,
        )


def generate(
    apply: Apply,
    head: Head,
    spec: Any,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new: int,
    **how: Any,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts i32[B,T], right-padded, of lengths i32[B] -> (tokens i32[B,max_new], lengths i32[B]).

    A row ends with the first of ``stop_ids``, which stays in tokens but is not counted in lengths; after it
    stands ``pad``. temperature 0 is greedy; above it samples with ``key`` from the ``top_k`` most likely tokens
    (0: all; Fan et al. 2018), of these from the smallest set whose probability reaches ``top_p`` (Holtzman et al.
    2020). key: one for the batch, or one a row [B]; then a row's text does not depend on the rows beside it.
    repetition_penalty: logits of tokens that the row holds already, its prompt included, are divided by it where
    positive and multiplied where negative (Keskar et al. 2019), also for greedy. apply and head may be wrapped by
    methods; ``batch`` holds further fields they read, one row each. All keywords but key and batch are static under
    jit; their defaults are those of `Writing`. The head runs on the last position only, and the loop ends when every
    row has ended.
    """
    writing = Writing(apply, head, spec, params, prompts, lengths, max_new=max_new, **how)
    state = writing.on(writing.start(), max_new)
    return state.tokens, state.lengths


def _folded(key: jax.Array, number: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(key, number) if _many(key) else jax.random.fold_in(key, number)


def _many(key: jax.Array) -> bool:
    """Whether this is one key a row; a raw key of the old kind is a vector itself."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


def penalised(scores: jax.Array, penalty: float) -> jax.Array:
    """Logits made less likely by a penalty above 1 (Keskar et al. 2019, section 4.1, on both sides of 0)."""
    return jnp.where(scores > 0, scores / penalty, scores * penalty)


def draw(key: jax.Array, scores: jax.Array, top_p: float, top_k: int = 0) -> jax.Array:
    """One token a row, i32[B], from logits f32[B,V], by one key or one a row: of the ``top_k`` most likely (0: all;
    ties stay), then of the nucleus, the most likely tokens whose mass before them is below ``top_p``: at least one."""
    if 0 < top_k < scores.shape[-1]:
        scores = jnp.where(scores >= jax.lax.top_k(scores, top_k)[0][:, -1:], scores, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(key, scores) if _many(key) else jax.random.categorical(key, scores)
    return drawn.astype(jnp.int32)
