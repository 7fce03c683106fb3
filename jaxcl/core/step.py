"""One training step as a pure function: forward, gradient, update, projection, observation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.core import compose
from jaxcl.core.paths import merge
from jaxcl.core.types import Apply, Batch, Clock, Ctx, Fixed, Gradient, Method, Outputs, Params, Phase, State
from jaxcl.errors import RequestError

Metrics = dict[str, jax.Array]
Step = Callable[[State, Fixed, Batch, Any], tuple[State, Metrics]]


def step_key(seed: Any, clock: Clock) -> jax.Array:
    """The step's random key, folded from (seed, stage, phase, step of the phase); none is stored."""
    key = jax.random.key(seed)
    for part in (clock.stage, clock.phase, clock.phase_step):
        key = jax.random.fold_in(key, part)
    return key


def make_step(
    apply: Apply,
    spec: Any,
    methods: Sequence[Method],
    tx: optax.GradientTransformation,
    phase: Phase,
    accumulate: int = 1,
    head: Callable[..., jax.Array] | None = None,
) -> Step:
    """The step of a phase, pure and unjitted: ``step(state, fixed, batch, seed) -> (state, metrics)``.

    ``tx`` may read ``clock=`` as an optax extra argument; ``head`` gives methods logits (``ctx.head``). ``accumulate``
    splits the rows of a batch (their number must be divisible by it) into as many micro-batches; a micro-batch's
    whole loss counts by its share of the target weight. metrics: f32 scalars ``loss``, ``objective``, every
    ``method/term``, ``grad_norm``, ``weight``, and the means of what the batch has under ``log``.
    """
    methods = compose.active(methods, phase)
    taps = tuple(sorted({t for m in methods for t in m.taps}))
    watch = any(m.observe is not None for m in methods)
    tx = optax.with_extra_args_support(phase.tx or tx)

    def step(state: State, fixed: Fixed, batch: Batch, seed: Any) -> tuple[State, Metrics]:
        clock = state.clock
        owns = {m.name: compose.own_of(m, fixed.own, state.live) for m in methods}
        model = compose.wrapped(apply, methods, fixed.own, state.live, clock)

        def loss_fn(train: Params, batch: Batch, key: jax.Array, with_terms: bool) -> tuple[jax.Array, dict]:
            params = merge(fixed.frozen, train)
            out_key, own_key = (jax.random.fold_in(key, i) for i in (0, 1))
            out = model(spec, params, batch, taps=taps, train=True, key=out_key)
            ctx = Ctx(params, None, batch, batch["weight"], out, clock, own_key, model, spec, head, out_key)
            ctx = ctx._replace(weight=compose.weights(methods, ctx, owns))
            named = {"objective": phase.objective(ctx)}
            if with_terms:
                named |= compose.terms(methods, ctx, owns)
            aux: dict[str, Any] = {"terms": named, "weight": jnp.sum(ctx.weight)}
            if watch:
                aux["out"] = {"nll": out.nll, "taps": dict(out.taps), "aux": dict(out.aux)}
            return jnp.asarray(sum(named.values())), aux

        def base_grad(train: Params, batch: Batch, key: jax.Array, *, terms: bool = True) -> tuple[Params, dict]:
            def one(batch: Batch, key: jax.Array) -> tuple[Params, dict]:
                (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(train, batch, key, terms)
                return grads, aux

            return one(batch, key) if accumulate == 1 else accumulated(one, batch, key, accumulate)

        def updated(train: Params, grads: Params) -> tuple[Params, Any]:
            updates, opt = tx.update(grads, state.opt, train, clock=clock)
            for m in methods:
                if m.project is not None:
                    updates = m.project(updates, merge(fixed.frozen, train), owns[m.name], clock)
            return updates, opt

        grad_fn = Gradient(
            of=base_grad,
            ahead=lambda train, grads: optax.apply_updates(train, updated(train, grads)[0]),
            forward=lambda train, batch: model(spec, merge(fixed.frozen, train), batch),
        )
        for m in methods:
            if m.grad is not None:
                grad_fn = dataclasses.replace(grad_fn, of=m.grad(grad_fn, owns[m.name], clock))
        key = step_key(seed, clock)
        grads, aux = grad_fn(state.train, batch, key)
        updates, opt = updated(state.train, grads)

        live = dict(state.live)
        if watch:
            out = Outputs(nll=aux["out"]["nll"], taps=aux["out"]["taps"], aux=aux["out"]["aux"])
            params = merge(fixed.frozen, state.train)
            ctx = Ctx(params, None, batch, batch["weight"], out, clock, key, model, spec, head)
            for m in methods:
                if m.observe is not None:
                    live[m.name] = m.observe(ctx._replace(own=owns[m.name]), grads, updates, state.train)

        metrics = {
            "loss": sum(aux["terms"].values()),
            **aux["terms"],
            "grad_norm": optax.tree.norm(grads),
            "weight": aux["weight"],
            **{k: jnp.mean(v) for k, v in batch.get("log", {}).items()},
        }
        clock = clock._replace(step=clock.step + 1, phase_step=clock.phase_step + 1)
        return State(clock, optax.apply_updates(state.train, updates), opt, live), metrics

    return step


def accumulated(one: Callable, batch: Batch, key: jax.Array, parts: int) -> tuple[Params, dict]:
    """``one(micro_batch, key) -> (grads, aux)`` summed over micro-batches, each by its share of the target weight.

    Micro-batch i takes rows i, i + parts, ...: strided, so that a batch sharded over devices stays where it is.
    Taps and aux of the outputs arrive summed, nll in the rows' order. RequestError: rows that do not split evenly.
    """
    rows = len(batch["tokens"])
    if rows % parts:
        raise RequestError(f"a gradient of {rows} rows does not split into accumulate={parts} equal parts")
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    grads, aux = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), key)
    nll = aux.get("out", {}).pop("nll", None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, aux))

    def body(carry: tuple, part: tuple) -> tuple[tuple, Any]:
        i, rows = part
        grads, aux = one(rows, jax.random.fold_in(key, i))
        nll = aux.get("out", {}).pop("nll", None)
        weight = aux["weight"] + 1e-12  # where a batch has no target at all, penalties still count, in equal shares
        scaled = jax.tree.map(lambda x: x * weight.astype(x.dtype), (grads, aux["terms"]))
        plain = {k: v for k, v in aux.items() if k != "terms"}
        total = jax.tree.map(jnp.add, carry, (scaled[0], {"terms": scaled[1], **plain}))
        return total, nll

    (grads, aux), stacked = jax.lax.scan(body, zeros, (jnp.arange(parts), micro))
    total = aux["weight"] + parts * 1e-12
    grads = jax.tree.map(lambda x: x / total.astype(x.dtype), grads)
    aux["terms"] = jax.tree.map(lambda x: x / total, aux["terms"])
    if nll is not None:
        aux["out"]["nll"] = stacked.swapaxes(0, 1).reshape(-1, *stacked.shape[2:])
    return grads, aux
