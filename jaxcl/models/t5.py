"""A T5 encoder-decoder over the flat dict: `t5(spec)` gives the Model record.

How a row becomes source and target: `jaxcl.models.t5_rows`. With a cache (`jaxcl.models.cache`) `prefill` runs the
encoder once over the prompts and the decoder over ``spec.start``; the cache holds, beside the decoder's own keys, those
of the source: ``decoder/layers/0/{k,v}`` and ``decoder/layers/0/cross/{k,v}``, ``source`` bool[B,M] (which of them are
real) and ``begins`` i32[B], the prompt's length. A token's slot is its position less that, plus one. What `extend` is
given at the position of the prompt's last token counts as ``spec.start``, whatever it is.

Shapes: B rows, T tokens, K targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..core.rows import keep_rows
from ..core.types import Batch, Inject, Model, Outputs, Params
from ..errors import RequestError
from .blocks import Embedding, RMSNorm, View, below
from .cache import Cache, closed, route
from .decoder import Layer, drawn, run_segment, visible
from .decoder import logits as plain_logits
from .nll import batch_nll, chunked_nll
from .prefix import network
from .prompt import prompt_of
from .t5_blocks import T5Block, T5Flow
from .t5_positions import position_bias
from .t5_rows import Side, behind, placed, prompts, sides
from .t5_spec import SIDES, T5Spec, axes, layout, tap_names
from .taps import check_taps, local_injections, local_taps, select


def t5(spec: T5Spec) -> Model:
    """The architecture as a record of free functions; see `jaxcl.core.types.Model`."""
    return Model(spec=spec, init=init, apply=apply, head=head, axes=axes)


def init(spec: T5Spec, key: jax.Array) -> Params:
    """Normal weights with the deviations of the T5 code, ones for norms; see `jaxcl.models.decoder.drawn`."""
    return drawn(spec, layout(spec), key)


def apply(
    spec: T5Spec,
    params: Params,
    batch: Batch,
    *,
    cache: Cache | None = None,
    taps: tuple[str, ...] = (),
    train: bool = False,
    key: jax.Array | None = None,
    inject: Mapping[str, Inject] | None = None,
    start: tuple[int, jax.Array] | None = None,
) -> Outputs:
    """The forward pass. batch: as for a decoder, with ``targets_at`` i32[B,K] unless a cache is filled or read.

    nll f32[B,K] in nats of each target given the source and the targets before it, 0 in unused slots. hidden [B,T,D]:
    at the place before a target the decoder's state that predicts it, zeros elsewhere; after `prefill` the state of the
    first token to come, at every place. taps: ``'encoder/layers/3/attn/q:in'``, ``'decoder/layers/0:out'``, over the
    places of that stack. Raises RequestError for rows of plain text, a tap or site that does not exist, dropout without
    a key, a ``start`` inside, targets while a cache is filled.
    """
    if start is not None:
        raise RequestError("T5 cannot start at a layer; accepted: whole forward passes")
    for name in ("dropout", "adapter_dropout"):
        if train and key is None and getattr(spec, name):
            raise RequestError(f"{name} is {getattr(spec, name)} without a key; accepted: train and key")
    run = _Pass(spec, params, batch, key if train else None, taps, inject or {})
    if cache is None:
        return run.whole()
    return run.extended(cache) if any(name.endswith("/k") for name in cache) else run.filled(cache)


class _Pass:
    """One forward pass, in its three forms."""

    def __init__(
        self, spec: T5Spec, params: Params, batch: Batch, key: Any, taps: tuple[str, ...], inject: Mapping[str, Inject]
    ):
        known = tap_names(spec) if taps or inject else ()
        check_taps(taps, known)
        self.spec, self.params, self.batch, self.key = spec, params, batch, key
        self.taps, self.inject, self.known = taps, inject, known
        self.seen: dict[str, jax.Array] = {}
        self.notes: dict[str, Any] = {}

    def whole(self) -> Outputs:
        """Source and targets of every row, all at once."""
        spec, batch = self.spec, self.batch
        source, target = sides(batch, spec.start, spec.end)
        flow = self.flow("decoder", target, visible(target.segments))
        flow.source, read = self.encoded(source)
        flow.reads = seeing(target, read)
        hidden, _ = self.stack("decoder", target, flow, {})
        at = batch["targets_at"]
        labels = jnp.take_along_axis(batch["tokens"], jnp.maximum(at, 0), axis=1)
        slots = jnp.broadcast_to(jnp.arange(at.shape[1]), at.shape)
        nll = chunked_nll(self.logits, hidden, slots, labels, spec.nll_chunk)
        return self.outputs(jnp.where(at > 0, nll, 0.0), placed(hidden, at, batch["tokens"].shape[1]), None)

    def filled(self, cache: Cache) -> Outputs:
        """Prompts alone: the encoder, and the decoder's first token."""
        if "targets_at" in self.batch:
            raise RequestError("T5 fills a cache from prompts alone; accepted: rows without targets_at")
        spec, (b, width) = self.spec, self.batch["tokens"].shape
        source, begins = prompts(self.batch, spec.end)
        one = jnp.ones((b, 1), jnp.int32)
        target = Side(spec.start * one, one, 0 * one)
        room = cache["valid"].shape[1] - width + 1  # the first token's slot, and those of what is written later
        own = {**cache, "valid": jnp.zeros((b, max(room, 1)), bool)}
        flow = self.flow("decoder", target, visible(one), own)
        flow.source, read = self.encoded(source)
        flow.reads = (read.segments > 0)[:, None]
        hidden, written = self.stack("decoder", target, flow, {})
        made = closed(own, flow, written)
        assert made is not None
        made |= {"source": read.segments > 0, "begins": begins}
        return self.outputs(None, jnp.broadcast_to(hidden, (b, width, hidden.shape[-1])), made)

    def extended(self, cache: Cache) -> Outputs:
        """A block of tokens after what the cache holds; the encoder does not run."""
        spec, batch = self.spec, self.batch
        segments = batch["segments"]
        positions = batch["positions"] - cache["begins"][:, None] + 1
        tokens = jnp.where(positions == 0, spec.start, batch["tokens"])
        target = Side(tokens, segments, positions)
        flow = self.flow("decoder", target, visible(segments), cache)
        flow.reads = (segments > 0)[:, :, None] & cache["source"][:, None]
        hidden, written = self.stack("decoder", target, flow, cache)
        nll = batch_nll(self.logits, hidden, batch, spec.nll_chunk) if "targets_at" in batch else None
        return self.outputs(nll, hidden, closed(cache, flow, written))

    def outputs(self, nll: Any, hidden: jax.Array, cache: Cache | None) -> Outputs:
        return Outputs(nll=nll, hidden=hidden, taps=self.seen, aux=self.notes, cache=cache)

    def encoded(self, source: Side) -> tuple[jax.Array, Side]:
        """(what the encoder makes of a source [B,M,D], all that it read): a soft prompt stands before the source."""
        prompt = prompt_of(self.params, len(source.tokens), self.spec.dtype)
        read = source if prompt is None else behind(prompt, source, "rows" in self.batch)
        same = read.segments[:, :, None] == read.segments[:, None, :]
        flow = self.flow("encoder", read, same & (read.segments > 0)[:, :, None])
        if prompt is None:
            return self.stack("encoder", read, flow, {})[0], read
        flow.skip = prompt.length
        return self.stack("encoder", read, flow, {}, prompt.rows)[0], read

    def flow(self, side: str, read: Side, block: jax.Array, cache: Cache | None = None) -> T5Flow:
        """The flow of a stack; dropout draws other numbers in each."""
        spec, table = self.spec, self.params[f"{side}/relative/table"]
        how: dict[str, Any] = {"both": side == "encoder", "distance": spec.distance}
        bias = position_bias(table, read.positions, read.positions, **how)
        key = None if self.key is None else jax.random.fold_in(self.key, SIDES.index(side))
        made = T5Flow(
            block=block, bias=bias, real=read.segments > 0, bank=self.batch.get("bank_weight"),
            rate=spec.adapter_dropout, own_rate=spec.dropout, key=key, prefix=network(self.params),
            **route(cache, {"segments": read.segments, "positions": read.positions}),
        )  # fmt: skip
        if made.past is not None:
            made.past_bias = position_bias(table, read.positions, jnp.arange(made.size)[None], **how)
        return made

    def stack(
        self, side: str, read: Side, flow: T5Flow, cache: Cache, rows: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """(what the encoder or decoder makes of its tokens [B,T,D] after the last norm, its cache entries); ``rows``
        [B,P,D] stand before the tokens."""
        spec, own, old = self.spec, below(self.params, side), below(cache, side)
        taps = tuple(name.removeprefix(side + "/") for name in self.taps if name.startswith(side + "/"))
        injected = {k.removeprefix(side + "/"): f for k, f in self.inject.items() if k.startswith(side + "/")}
        known = [name.removeprefix(side + "/") for name in self.known if name.startswith(side + "/")]
        placed_here = local_injections(spec, injected, known)
        x = Embedding(below(self.params, "embed"))(read.tokens, spec.dtype)
        x = flow.own("embed", x if rows is None else jnp.concatenate([rows, x], axis=1))
        seen: dict[str, jax.Array] = {}
        written: Cache = {}
        for run in spec.runs:
            wanted = local_taps(run, taps)
            layer = layer_of(spec, side == "decoder")
            x, kept, left, new = run_segment(layer, own, run, x, {"block": flow}, old, wanted, placed_here, spec.remat)
            seen |= kept
            self.notes |= {f"{side}/{site}": value for site, value in left.items()}
            written |= {f"{side}/{name}": leaf for name, leaf in new.items()}
        self.seen |= {f"{side}/{name}": value for name, value in select(spec, seen, taps).items()}
        return flow.own("final_norm", RMSNorm(below(own, "final_norm"), spec.norm_eps)(keep_rows(x))), written

    def logits(self, hidden: jax.Array) -> jax.Array:
        return logits(self.spec, self.params, hidden)


def layer_of(spec: T5Spec, crossed: bool) -> Layer:
    """One layer of a stack as `run_segment` takes it."""

    def layer(view: View, x: jax.Array, flow: T5Flow, old: Cache) -> tuple[jax.Array, Cache]:
        return T5Block(view, spec, crossed)(x, flow, old)

    return layer


def seeing(target: Side, source: Side) -> jax.Array:
    """bool [B,K,M]: a target sees the source of its own segment."""
    same = target.segments[:, :, None] == source.segments[:, None, :]
    return same & (target.segments > 0)[:, :, None]


def head(spec: T5Spec, params: Params, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """logits f32[B,N,V] of the token after each place of at i32[B,N], from hidden [B,T,D]."""
    return logits(spec, params, jnp.take_along_axis(hidden, at[..., None], axis=1))


def logits(spec: T5Spec, params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] -> f32[..., V]; where ``spec.scaled``, hidden is divided by sqrt(D) first."""
    return plain_logits(spec, params, hidden * jnp.asarray(spec.width**-0.5, hidden.dtype) if spec.scaled else hidden)
