"""Rho-1: selective language modeling. Card cpt/rho-1.

Lin et al., NeurIPS 2024. Of every batch only the tokens with the highest excess loss count, the loss of the model in
training less that of a reference model; the others stay in the context. The reference comes from a phase of its own:
the model trains on a few good rows of the stage, scores the stage, and is put back as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.host_rng import host_rng
from jaxcl.core.types import Batch, Ctx, Method, Own, Params, Phase, Stream, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.selection import top_share

SELECTIONS = ("excess", "loss", "random")
SCORES = ("precomputed", "live")
DTYPES = ("float16", "float32")


@method
def rho1(
    share: float = 0.6,
    selection: str = "excess",
    reference: float | Sequence[Any] | None = 0.1,
    epochs: float = 3.0,
    scores: str = "precomputed",
    dtype: str = "float16",
    name: str = "rho1",
) -> Method:
    """Weighs the stage's tokens by 1 where they are among the ``share`` of highest score in the batch, else by 0.

    share: 0.6 for 1B, 0.7 for 7B parameters. selection: ``excess`` (Rho-1), or a control: ``loss``, the model's own
    loss, or ``random``. reference: the good rows, by their indices in the stage, or such a list for each stage; a
    number is a share of the rows drawn at random, where none are known to be better; None is the model as the stage
    begins, another method ("loss increase"). epochs: of the reference phase, in which no method acts; it has a fresh
    optimizer and so has the phase behind it. scores: ``precomputed`` asks the reference once about every token and
    holds one ``dtype`` number each; ``live`` holds its weights and pays a forward pass a step.

    Replayed rows keep their weight and are not ranked. Under accumulation a micro-batch is ranked by itself. Rows do
    not share a sequence. List it behind methods that plan phases (elle). Raises RequestError for a share outside
    (0, 1], epochs that are not positive, an unknown selection, scores or dtype, rows that are not in the stage.
    """
    if not 0 < share <= 1 or epochs <= 0:
        raise RequestError(f"rho1: share {share}, epochs {epochs}; accepted: share above 0 up to 1, epochs > 0")
    for what, value, known in (
        ("selection", selection, SELECTIONS), ("scores", scores, SCORES), ("dtype", dtype, DTYPES)
    ):  # fmt: skip
        if value not in known:
            raise unknown(what, value, known, where="rho1")
    if isinstance(reference, int | float) and not 0 < reference <= 1:
        raise RequestError(f"rho1: reference is {reference}; accepted: a share above 0 up to 1, rows, None")

    def score(forward: Any, train: Params, batch: Batch, key: jax.Array) -> jax.Array:
        return forward(train, batch).nll[0].astype(dtype)

    def scored(world: World, n: int | None = None) -> Own:
        """What `weigh` needs of the reference, which the model is now."""
        if scores == "live":
            return {"fixed": {"model": trained(world)}}
        return {"fixed": {"nll": world.tools.each(score, world.key, n)}}

    def init(world: World) -> Own:
        return scored(world) if reference is None else {"fixed": {"before": trained(world)}}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        rows = Stream(world.stage, good_rows(reference, world))
        first = Phase("reference", None, (rows,), epochs=epochs, active=frozenset(), after=after)
        return [first, dataclasses.replace(phases[0], reset_opt=True), *phases[1:]]

    def after(world: World, own: Own) -> tuple[World, Own]:
        return world._replace(params={**world.params, **own["fixed"]["before"]}), scored(world)

    def end(world: World, own: Own) -> tuple[World, Own]:
        return world, {}  # the next stage has its own reference, made by `init`

    def weigh(ctx: Ctx) -> jax.Array:
        new = (ctx.batch["stage"] == ctx.clock.stage)[:, None]
        chosen = top_share(rank(ctx), (ctx.batch["weight"] > 0) & new, share)
        return jnp.where(new, chosen.astype(jnp.float32), 1.0)

    def rank(ctx: Ctx) -> jax.Array:
        if selection == "random":
            return jax.random.uniform(ctx.key, ctx.out.nll.shape)
        return ctx.out.nll if selection == "loss" else ctx.out.nll - of_reference(ctx)

    def of_reference(ctx: Ctx) -> jax.Array:
        """f32 like nll: the reference's loss of every token."""
        fixed = ctx.own["fixed"]
        if "before" in fixed:
            wanted = f"list {name!r} behind methods that plan phases"
            raise RequestError(f"another method changed the reference phase of {name!r}; {wanted}")
        if scores == "live":
            params = jax.lax.stop_gradient({**ctx.params, **fixed["model"]})
            return ctx.model(ctx.spec, params, ctx.batch).nll
        if "old_logp" in ctx.batch:
            raise RequestError(f"{name}: precomputed scores are of the rows' own answers, not rollouts; use 'live'")
        return fixed["nll"][jnp.maximum(ctx.batch["row"], 0)].astype(jnp.float32)

    phased = selection == "excess" and reference is not None
    memory: dict[str, Any] = {"init": init, "end": end} if selection == "excess" else {}
    memory |= {"plan": plan} if phased else {}
    return Method(name=name, packs=False, weigh=weigh, **memory)


def trained(world: World) -> Params:
    """The trained parameters as they are now."""
    return {k: world.params[k] for k in sorted(world.trained)}


def good_rows(reference: Any, world: World) -> np.ndarray:
    """int64: the rows of the stage that the reference learns from. RequestError: a row that is not there, no rows."""
    size = world.tools.size(world.stage)
    if isinstance(reference, int | float):
        return np.sort(host_rng(world.key).permutation(size)[: max(1, round(reference * size))])
    per_stage = len(reference) > 0 and not isinstance(reference[0], int)
    if per_stage and world.stage >= len(reference):
        raise RequestError(f"rho1: reference has rows for {len(reference)} stages, this is stage {world.stage + 1}")
    rows = np.asarray(reference[world.stage] if per_stage else reference, np.int64)
    bad = rows[(rows < 0) | (rows >= size)]
    if not len(rows) or len(bad):
        what = f"row {bad[0]}" if len(bad) else "no rows"
        raise RequestError(f"rho1: {what} for the reference of stage {world.stage + 1}; accepted: 0 to {size - 1}")
    return rows
