"""A decoder of Llama's type over the flat dict: `decoder(spec)` gives the Model record.

The stack of segments is a plain function: layers with keys of their own in a Python loop, stacked ones in
`jax.lax.scan`. Shapes: B rows, T tokens, K targets, D width, V vocabulary, R repeats of a stacked segment.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..core.rows import keep_rows
from ..core.types import Batch, Inject, Model, Outputs, Params
from ..errors import RequestError
from .blocks import Block, Embedding, RMSNorm, View, below
from .cache import Cache, Written, closed, route
from .flow import Flow
from .layout import Leaf, axes, layout
from .nll import batch_nll
from .prefix import network
from .prompt import Prompt, prompt_of, with_room
from .rope import rope
from .spec import DecoderSpec, Run
from .stacking import restack
from .taps import check_taps, joined, local_injections, local_taps, select, tap_names

Layer = Callable[[View, jax.Array, Any, Cache], tuple[jax.Array, Cache]]
"""(parameters of a layer, x [B,T,D], its flow, its cache entries) -> (x, the entries that it writes)."""
SAVED = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}  # remat: what is kept


def decoder(spec: DecoderSpec) -> Model:
    """The architecture as a record of free functions; see `jaxcl.core.types.Model`."""
    return Model(spec=spec, init=init, apply=apply, head=head, axes=axes)


def init(spec: DecoderSpec, key: jax.Array) -> Params:
    """Normal weights of std ``spec.init_std`` (outputs to the residual stream divided by sqrt(2 layers)), ones for
    norms; see `drawn`."""
    return drawn(spec, layout(spec), key)


def drawn(spec: Any, table: Mapping[str, Leaf], key: jax.Array) -> Params:
    """Parameters of ``spec.param_dtype`` in the spec's segments: normal with each leaf's std, ones where it is None.
    Every tensor has its own key from its path, so stacking does not change a number."""

    def draw(path: str, shape: tuple[int, ...], std: float | None) -> jax.Array:
        if std is None:
            return jnp.ones(shape, spec.param_dtype)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return (std * jax.random.normal(own, shape, jnp.float32)).astype(spec.param_dtype)

    params = {path: draw(path, leaf.shape, leaf.std) for path, leaf in table.items()}
    return restack(params, spec, spec.segments, now=spec.unstacked)[0]


def apply(
    spec: DecoderSpec,
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
    """The forward pass. batch: tokens, segments (0 = padding), positions i32[B,T]; optional targets_at
    i32[B,K], bank_weight f32[B,S]. Where ``params`` hold a soft prompt, see `jaxcl.models.prompt`.

    nll, f32 in nats: with targets_at [B,K], of token ``tokens[b, targets_at[b,k]]`` given the tokens before
    it (0 where targets_at <= 0); without [B,T], 0 where a token starts its segment or is padding. With a
    cache and without targets_at nll is None. taps: ``'layers/7/attn/q:in'`` the input of a dense site,
    ``'layers/7:out'`` the residual stream after a layer. inject: see `jaxcl.core.types.Apply`; sites are dense ones
    of layers with keys of their own, ``'layers/7/mlp/down'``. start: (7, x) with x the tap ``'layers/6:out'``; taps
    and sites must then be of layers from 7 on. train with ``key``: adapter dropout. Raises RequestError on a tap or
    site that does not exist, on a sequence longer than ``spec.context``, on dropout without a key, on a start inside
    a stack.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] > spec.context:
        raise RequestError(f"a sequence has {tokens.shape[1]} tokens; accepted: up to {spec.context} (context)")
    if train and spec.adapter_dropout and key is None:
        raise RequestError(f"adapter_dropout is {spec.adapter_dropout} without a key; accepted: train and key")
    block, prompt, skip = batch, prompt_of(params, len(tokens), spec.dtype), 0
    if prompt is not None:
        block, cache, prompt = with_room(prompt, batch, cache, spec.context)
        skip = prompt.length if prompt else 0
    flows = flows_of(spec, block, cache, key if train else None, prompt, network(params))
    if start is None:
        runs, x = spec.runs, Embedding(below(params, "embed"))(tokens, spec.dtype, spec.embed_scale)
        x = x if prompt is None else jnp.concatenate([prompt.rows, x], axis=1)
    elif skip:
        raise RequestError(f"start: at layer {start[0]} the soft prompt's own stream is not known; accepted: no prompt")
    else:
        runs, x = spec.runs_from(start[0]), start[1]
    seen: dict[str, jax.Array] = {}
    notes: dict[str, Any] = {}
    written: Cache = {}
    known = tap_names(spec) if taps or inject else ()
    check_taps(taps, known)
    placed = local_injections(spec, inject or {}, known)
    for run in runs:
        wanted = local_taps(run, taps)
        x, kept, left, new = run_segment(layer_of(spec), params, run, x, flows, cache or {}, wanted, placed, spec.remat)
        seen |= kept
        notes |= left
        written |= new
    hidden = RMSNorm(below(params, "final_norm"), spec.norm_eps)(keep_rows(x[:, skip:]))
    nll = None
    if cache is None or "targets_at" in batch:
        nll = batch_nll(lambda rows: logits(spec, params, rows), hidden, batch, spec.nll_chunk)
    kept = select(spec, seen, taps)
    return Outputs(nll=nll, hidden=hidden, taps=kept, aux=notes, cache=closed(cache, flows["block"], written))


def flows_of(
    spec: DecoderSpec, batch: Batch, cache: Cache | None, key: jax.Array | None,
    prompt: Prompt | None = None, prefix: jax.Array | None = None,
) -> dict[str, Flow]:  # fmt: skip
    """{kind of layer: its Flow}; a soft prompt stands before the tokens in ``batch`` too."""
    positions, skip = batch["positions"], prompt.length if prompt else 0
    block = visible(batch["segments"][:, skip:])
    whole = Flow(
        rope=rope(spec, "block", positions),
        block=prompt.seen(block) if prompt else block,
        real=batch["segments"] > 0,
        skip=skip,
        prefix=prefix,
        bank=batch.get("bank_weight"),
        rate=spec.adapter_dropout,
        key=key,
        **route(cache, batch),
    )
    if spec.window is None:
        return {"block": whole}
    return {"block": whole, "local": whole.local(rope(spec, "local", positions), positions, spec.window)}


def visible(segments: jax.Array) -> jax.Array:
    """bool [B,T,T]: token t sees token s of its own segment when s <= t. Padding (segment 0) sees nothing."""
    t = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    return same & (segments > 0)[:, :, None] & jnp.tril(jnp.ones((t, t), bool))


def layer_of(spec: DecoderSpec) -> Layer:
    """One layer of the decoder as `run_segment` takes it."""

    def layer(view: View, x: jax.Array, flow: Flow, old: Cache) -> tuple[jax.Array, Cache]:
        y, written = Block(view, spec)(x, flow, Written(old["k"], old["v"]) if old else None)
        return y, {} if written is None else {"k": written.k, "v": written.v}

    return layer


def run_segment(
    layer: Layer,
    params: Params,
    run: Run,
    x: jax.Array,
    flows: Mapping[str, Any],
    cache: Cache,
    wanted: dict[str, frozenset[str]],
    injected: dict[str, dict[str, Inject]],
    remat: str,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any], Cache]:
    """One segment of layers: (x [B,T,D], taps by path, notes by site, cache entries), each with a
    leading R when stacked. ``layer`` runs one of them, ``flows`` are by kind of layer."""
    views = {prefix: below(params, prefix) for prefix in run.prefixes}
    old = {prefix: below(cache, prefix) for prefix in run.prefixes}

    def once(x: jax.Array, each: tuple) -> tuple[jax.Array, tuple]:
        views, old, layers = each
        seen: dict[str, jax.Array] = {}
        notes: dict[str, Any] = {}
        new: Cache = {}
        for kind, prefix in zip(run.kinds, run.prefixes):

            def block(x: jax.Array, view: Any, old: Any, number: Any, kind: str = kind, prefix: str = prefix) -> tuple:
                here = flows[kind].at(number, wanted[prefix], injected.get(prefix, {}))
                y, written = layer(view, x, here, old)
                return y, here.seen, here.notes, written

            step = block if remat == "none" else jax.checkpoint(block, policy=SAVED[remat])
            x, taps, left, written = step(keep_rows(x), views[prefix], old[prefix], layers[prefix])
            seen |= {joined(prefix, name): value for name, value in taps.items()}
            notes |= {f"{prefix}/{site}": value for site, value in left.items()}
            new |= {f"{prefix}/{name}": leaf for name, leaf in written.items()}
        return x, (seen, notes, new)

    if run.repeats == 1:
        x, (seen, notes, new) = once(x, (views, old, {p: r.start for p, r in zip(run.prefixes, run.layers)}))
    else:
        layers = {p: jnp.arange(r.start, r.stop, r.step) for p, r in zip(run.prefixes, run.layers)}
        x, (seen, notes, new) = jax.lax.scan(once, x, (views, old, layers))
    return x, seen, notes, new


def head(spec: DecoderSpec, params: Params, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """logits f32[B,N,V] of the token after each position of at i32[B,N], from hidden [B,T,D]."""
    rows = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return logits(spec, params, rows)


def logits(spec: Any, params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] -> f32[..., V], with the embedding as head where the spec is tied; ``vocab_bias`` f32[V], where there is
    one, closes rows of the vocabulary (see `jaxcl.surgery.vocabulary`)."""
    kernel = params["embed/kernel"].T if spec.tied else params["head/kernel"]
    scores = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return scores + params["vocab_bias"] if "vocab_bias" in params else scores
