"""Prefixes made, and the network through which they may be trained. Source: Li and Liang 2021, sections 4 and 7.4."""

from __future__ import annotations

import functools
import itertools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.paths import concrete, is_stacked
from jaxcl.core.types import Params, World
from jaxcl.errors import RequestError
from jaxcl.models.prefix import MAP, NAMES, materialised
from jaxcl.models.rope import rope, rotate
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.stacking import restack
from jaxcl.models.t5_spec import T5Spec

STD = 0.02
"""Of what is drawn: small beside keys and values of words."""


def check(spec: Any, length: int, name: str) -> None:
    """RequestError for a prefix without rows, and a model that takes none."""
    if not isinstance(spec, DecoderSpec | T5Spec):
        raise RequestError(f"{name}: a {type(spec).__name__} takes no prefix; accepted: a decoder, a T5")
    if length < 1:
        raise RequestError(f"{name}: length is {length}; accepted: a whole number of at least 1")


def random(spec: Any, length: int, key: jax.Array) -> Params:
    """{layers/../attn/prefix_k and _v: N(0, STD^2) f32[p, G*Dh]}; every layer draws with a key of its own name."""
    out: Params = {}
    for site, name in itertools.product(spec.attentions, NAMES):
        path = f"{site}/{name}"
        keys = [jax.random.fold_in(key, zlib.crc32(p.encode())) for p in concrete(path)]
        drawn = [STD * jax.random.normal(k, (length, spec.kv_width), jnp.float32) for k in keys]
        out[path] = jnp.stack(drawn) if is_stacked(path) else drawn[0]
    return out


def of_text(world: World, length: int) -> Params:
    """{layers/../attn/prefix_k and _v}: those of the first ``length`` tokens of the stage, as if they stood before
    every text; of a T5, as if they were both source and answer. RequestError where they are more than the model's
    context."""
    spec = world.spec
    if length > getattr(spec, "context", length):
        raise RequestError(f"a prefix of {length} tokens of text; accepted: up to {spec.context} (context)")
    ids: list[int] = []
    while len(ids) < length:  # again from the start where the stage has fewer
        for batch in world.tools.batches(world.stage):
            ids += np.asarray(batch["tokens"])[np.asarray(batch["segments"]) > 0].tolist()
            if len(ids) >= length:
                break
    bare = {k: v for k, v in world.params.items() if "prefix" not in k and not k.startswith("prompt/")}
    read = _read_t5 if isinstance(spec, T5Spec) else _read
    return read(spec, bare, jnp.asarray([ids[:length]], jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _read(spec: DecoderSpec, params: Params, tokens: jax.Array) -> Params:
    from jaxcl.models.cache import prefill
    from jaxcl.models.decoder import apply

    length = tokens.shape[1]
    places = jnp.arange(length, dtype=jnp.int32)[None]
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": places}
    cache = prefill(apply, spec, params, batch, length).cache
    out: Params = {}
    for run in spec.runs:
        for kind, prefix in zip(run.kinds, run.prefixes):
            back = rope(spec, kind, jnp.full((1, 1), -length, jnp.int32))  # from 0 .. p-1 to -p .. -1
            k, v = (cache[f"{prefix}/{name}"].astype(jnp.float32) for name in "kv")
            turn = lambda x, back=back: rotate(x, back)  # noqa: E731
            k = jax.vmap(turn)(k) if run.repeats > 1 else turn(k)
            for name, x in zip(NAMES, (k, v)):
                x = jnp.squeeze(x, axis=x.ndim - 4)  # the only row
                out[f"{prefix}/attn/{name}"] = x.reshape(*x.shape[:-2], -1)
    return out


@functools.partial(jax.jit, static_argnums=0)
def _read_t5(spec: T5Spec, params: Params, tokens: jax.Array) -> Params:
    from jaxcl.models.t5 import apply

    length, (params, single) = tokens.shape[1], restack(params, spec, spec.unstacked)
    places = jnp.arange(2 * length, dtype=jnp.int32)[None]
    rows = {"tokens": jnp.tile(tokens, 2), "segments": jnp.ones_like(places), "positions": places}
    sites = {f"{site}/{name}": f"{site}/{at}" for site in single.attentions for name, at in zip(NAMES, "kv")}
    inject = {at: lambda x, y: (y, {"kept": y[0, :length].astype(jnp.float32)}) for at in sites.values()}
    notes = apply(single, params, {**rows, "targets_at": places[:, length:]}, inject=inject).aux
    return restack({path: notes[at]["kept"] for path, at in sites.items()}, single, spec.segments)[0]


def network(spec: Any, length: int, hidden: int, key: jax.Array) -> Params:
    """A fresh network, {prefix/rows, prefix/in, ..; layers/../attn/prefix_map, ..}, that adds nothing yet: its last
    layer is 0. Weights of the first are U(-1/sqrt(in), 1/sqrt(in)), rows N(0, 1)."""
    d, kv, rows = spec.width, spec.kv_width, jax.random.fold_in(key, 1)
    out: Params = {
        "prefix/rows": jax.random.normal(rows, (length, d), jnp.float32),
        "prefix/in": jax.random.uniform(key, (d, hidden), jnp.float32, -(d**-0.5), d**-0.5),
        "prefix/in_bias": jnp.zeros(hidden, jnp.float32),
    }
    for site, repeats in spec.attentions.items():
        lead = (repeats,) if repeats > 1 else ()
        out[f"{site}/{MAP[0]}"] = jnp.zeros((*lead, hidden, 2, kv), jnp.float32)
        out[f"{site}/{MAP[1]}"] = jnp.zeros((*lead, 2, kv), jnp.float32)
    return out


def collapsed(params: Params) -> Params:
    """{key: new value}: keys and values are what the network made of them, and it adds nothing more."""
    silent = {k: jnp.zeros_like(v) for k, v in params.items() if k.rpartition("/")[2] in MAP}
    return materialised(params) | silent
