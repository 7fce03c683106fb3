"""IDBR: features in a space that tasks share and one that is each task's own, both held near the stage before's. Card
cft/feature-regularization.

Huang, Zhang, Chen, Wang and Yang, NAACL 2021 (arXiv 2104.05489). Two heads read the feature h of a row, the last hidden
state of its prompt's last token: g = tanh(G h) and s = tanh(S h). g learns to tell a prompt from the same prompt with
its two halves swapped, s to tell the stages apart; from the second stage on both keep to what the last stage's model
makes of the row. Old rows come from another method, such as `replay`.

The paper's model is an encoder that classifies from g and s, with a mark between the halves. A language model
answers from h itself, so the heads shape h through their losses alone, and the halves stand without a mark.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch, Ctx, Method, Own, Params, World, method
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.losses.distillation import masked_mean
from jaxcl.losses.positions import prompt_end
from jaxcl.methods.lwf import snapshot


@method
def idbr(
    general: float = 0.5,
    specific: float = 0.5,
    new: float = 0.5,
    old: float = 5.0,
    order: float = 1.0,
    task: float = 1.0,
    width: int = 128,
    max_stages: int = 16,
    name: str = "idbr",
) -> Method:
    """Adds order * CE(order | g) + task * CE(stage | s) + c (general * |g - g'|^2 + specific * |s - s'|^2) / width,
    where c is ``new`` for rows of this stage and ``old`` for others. Means over rows; defaults of the authors' code.

    g', s': by weights and heads as they were at the end of the last stage, under the same dropout; held are the
    trained parameters. The order costs a second forward and backward pass: of a prompt's tokens behind the first, a
    part of random length changes places with the rest; prompts of fewer than three tokens are left out. Stages to come
    are no candidates. Heads are ``idbr/*``, drawn as torch draws a Linear, without its bias' draw.

    RequestError for negative weights, a width or max_stages below 1, a stage beyond max_stages, a model whose spec has
    no width; KeyTaken where there are such heads.
    """
    weights = {"general": general, "specific": specific, "new": new, "old": old, "order": order, "task": task}
    for what, value in weights.items():
        if value < 0:
            raise RequestError(f"idbr: {what} is {value}; accepted: 0 or more")
    for what, count in (("width", width), ("max_stages", max_stages)):
        if count < 1:
            raise RequestError(f"idbr: {what} is {count}; accepted: a whole number of at least 1")
    keeping = (general or specific) and (new or old)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if world.stage >= max_stages:
            raise RequestError(f"idbr: stage {world.stage + 1} exceeds max_stages={max_stages}; raise it")
        return (with_heads(world, width, max_stages), {}) if own is None else (world, own)

    def kept(world: World) -> Own:
        return {"fixed": {"teacher": snapshot(world)}} if keeping else {}

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, kept(world)

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        real = ctx.batch["stage"] >= 0
        g, s = spaces(ctx.params, ctx.out.hidden, ctx.batch)
        terms: dict[str, jax.Array] = {}
        if order:
            told, can = orders(ctx, g)
            terms["order"] = order * masked_mean(told, real & can)
        if task:
            known = jnp.arange(ctx.params["idbr/task"].shape[1]) <= ctx.clock.stage
            logits = jnp.where(known, linear(ctx.params, "task", s), -jnp.inf)
            terms["task"] = task * masked_mean(cross_entropy(logits, jnp.maximum(ctx.batch["stage"], 0)), real)
        if keeping:
            # One compilation, and no teacher to pay for, in the first stage.
            still = lambda: jnp.zeros((), jnp.float32)  # noqa: E731
            terms["kept"] = jax.lax.cond(ctx.clock.stage > 0, lambda: masked_mean(away(ctx, g, s), real), still)
        return terms

    def away(ctx: Ctx, g: jax.Array, s: jax.Array) -> jax.Array:
        params = jax.lax.stop_gradient({**ctx.params, **ctx.own["fixed"]["teacher"]})
        taught = ctx.model(ctx.spec, params, ctx.batch, train=True, key=ctx.out_key)
        was = spaces(params, taught.hidden, ctx.batch)
        far = [jnp.mean(jnp.square(x - jax.lax.stop_gradient(y)), axis=1) for x, y in zip((g, s), was)]
        return jnp.where(ctx.batch["stage"] == ctx.clock.stage, new, old) * (general * far[0] + specific * far[1])

    parts: dict[str, Any] = {"begin": begin, "init": kept, "loss": loss, "end": end}
    idle = not (order or task or keeping)
    return Method(name=name, kinds={"teacher": "value"}, packs=False, **({} if idle else parts))


def with_heads(world: World, width: int, stages: int) -> World:
    """The world with fresh heads: U(-1/sqrt(in), 1/sqrt(in)), biases zero."""
    size = getattr(world.spec, "width", None)
    if size is None:
        raise RequestError("idbr needs the width of the model's last hidden state; its spec has no 'width'")
    heads: Params = {}
    for what, shape in {"general": (size, width), "specific": (size, width), "task": (width, stages),
                        "order": (width, 2)}.items():  # fmt: skip
        path, bound = f"idbr/{what}", shape[0] ** -0.5
        if path in world.params:
            raise KeyTaken(f"{path!r} is there already; one IDBR at a time has its heads", path)
        key = jax.random.fold_in(world.key, zlib.crc32(path.encode()))
        heads[path] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        heads[f"{path}_bias"] = jnp.zeros(shape[1], jnp.float32)
    return world._replace(params={**world.params, **heads})


def spaces(params: Params, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(g, s), each f32[B, width], from last hidden states [B,T,D]."""
    h = jnp.take_along_axis(hidden, prompt_end(batch)[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.tanh(linear(params, "general", h)), jnp.tanh(linear(params, "specific", h))


def orders(ctx: Ctx, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the nll f32[B] of each row's prompt being whole and of its turned one being turned, halved; bool[B]: whether the
    prompt can be turned)."""
    batch = ctx.batch | {"tokens": turned(ctx.batch, jax.random.fold_in(ctx.key, 0))}
    out = ctx.model(ctx.spec, ctx.params, batch, train=True, key=jax.random.fold_in(ctx.key, 1))
    other, _ = spaces(ctx.params, out.hidden, batch)
    whole, swapped = (cross_entropy(linear(ctx.params, "order", x), jnp.int32(i)) for i, x in enumerate((g, other)))
    return 0.5 * (whole + swapped), prompt_end(ctx.batch) >= 2


def turned(batch: Batch, key: jax.Array) -> jax.Array:
    """i32[B,T]: the tokens, those of a prompt behind its first one, which may be a begin mark, turned by 1 to n - 1 of
    their n places. Answers stay."""
    tokens, n = batch["tokens"], prompt_end(batch)[:, None]
    place = jnp.arange(tokens.shape[1])
    by = jax.random.randint(key, n.shape, 1, jnp.maximum(n, 2))
    origin = jnp.where((place >= 1) & (place <= n), 1 + (place - 1 + by) % jnp.maximum(n, 1), place)
    return jnp.take_along_axis(tokens, origin, axis=1)


def linear(params: Params, head: str, x: jax.Array) -> jax.Array:
    return x @ params[f"idbr/{head}"] + params[f"idbr/{head}_bias"]


def cross_entropy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """f32[B]: nats of ``wanted`` i32[B] or i32[] under logits [B,N]."""
    chosen = jnp.broadcast_to(wanted, logits.shape[:1])[:, None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=1)[:, 0]
