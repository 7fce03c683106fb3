"""Experience replay: rows of past stages beside those of the current one. Card cft/experience-replay.

Memory: indices of rows, chosen at the end of each stage (see `jaxcl.data.reservoir`). Reading, ``mixing``: the union
of new rows and a share of each old stage (the rule of CT0, a ratio, and of CITB, a count), a loss of its own on as many
old rows as new ones in every step (Chaudhry et al. 2019), bursts of old rows after every so many new ones (d'Autume et
al. 2019), or a phase of old rows behind the new ones (TRACE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.host_rng import host_rng
from jaxcl.core.types import Budget, Ctx, Method, Own, Phase, Stream, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.methods import memory
from jaxcl.methods.agem import with_reference

MIXINGS = ("dataset", "joint", "sparse", "after")


@method
def replay(
    ratio: float | None = None,
    count: int | None = None,
    capacity: int | None = 4096,
    capacity_bytes: int | None = None,
    policy: str = "reservoir",
    mixing: str = "dataset",
    strength: float = 1.0,
    every: int = 10_000,
    burst: int = 100,
    seed: int = 0,
    name: str = "replay",
) -> Method:
    """Replays stored rows of every past stage; every new row is still seen.

    capacity: rows held over all stages; capacity_bytes: or bytes of them, a row being its arrays (None: no such limit).
    policy: ``reservoir``, ``class_balanced``, ``ring`` (the last rows of every class) or ``herding`` (those whose mean
    feature is that of the class). seed: of the memory.

    mixing: ``dataset`` mixes rows into the phases; ratio: rows drawn of an old stage per epoch, as a share of that
    stage's size (default 0.1, TRACE's), or count: rows of each (10 or 50 in CITB). Drawn rows that the memory holds
    fewer of repeat. ``after`` reads as many of them in a phase behind the others, which favours old stages. ``joint``
    adds strength * mean loss of a batch of old rows in every step, logged by itself. ``sparse`` breaks the phase after
    every ``every`` new rows for one of ``burst`` old ones (100 and 10000: the 1% rule); a schedule of the learning rate
    then starts anew in every part. Raises RequestError for a ratio outside [0, 1], a negative count, strength, burst or
    capacity, both or none of the capacities, an unknown policy or mixing, arguments of another mixing.
    """
    if ratio is not None and count is not None:
        raise RequestError(f"replay takes ratio or count, not both (ratio={ratio}, count={count})")
    if mixing not in MIXINGS:
        raise unknown("mixing", mixing, MIXINGS, where="replay")
    shares = mixing in ("dataset", "after")
    if not shares and (ratio, count) != (None, None):
        raise RequestError(f"replay: ratio {ratio}, count {count} with mixing {mixing!r}; accepted: dataset, after")
    ratio = 0.1 if shares and ratio is None and count is None else ratio
    if ratio is not None and not 0 <= ratio <= 1:
        raise RequestError(f"replay: ratio is {ratio}; accepted: 0 to 1")
    if strength < 0 or every < 1:
        raise RequestError(f"replay: strength {strength}, every {every}; accepted: strength >= 0, every >= 1")
    if (capacity is None) == (capacity_bytes is None):
        both = f"capacity {capacity}, capacity_bytes {capacity_bytes}"
        raise RequestError(f"replay: {both}; accepted: one of them, the other None")
    memory.check("replay", policy, count=count or 0, capacity=capacity or 0, bytes=capacity_bytes or 0, burst=burst)

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        held = memory.by_stage(own["host"])
        return PLANS[mixing](world, held, phases)

    def mixed(world: World, held: dict[int, np.ndarray], phases: list[Phase]) -> list[Phase]:
        old = drawn(world, held)
        return [dataclasses.replace(p, streams=p.streams + old) for p in phases] if old else phases

    def behind(world: World, held: dict[int, np.ndarray], phases: list[Phase]) -> list[Phase]:
        old = drawn(world, held)
        return [*phases, Phase(name, None, old, reset_opt=False)] if old else phases

    def beside(world: World, held: dict[int, np.ndarray], phases: list[Phase]) -> list[Phase]:
        return [with_reference(p, name, held) for p in phases]

    def broken(world: World, held: dict[int, np.ndarray], phases: list[Phase]) -> list[Phase]:
        total = sum(len(rows) for rows in held.values())
        old = tuple(Stream(s, rows, share=burst / total) for s, rows in held.items()) if burst else ()
        whole = lambda p: not old or p.after is not None or p.active is not None  # noqa: E731  another method's own
        return [part for p in phases for part in ([p] if whole(p) else parts(p, old, world, every, name))]

    def drawn(world: World, held: dict[int, np.ndarray]) -> tuple[Stream, ...]:
        wanted = lambda stage: count if ratio is None else ratio * world.tools.size(stage)  # noqa: E731
        old = tuple(Stream(s, rows, share=(wanted(s) or 0) / len(rows)) for s, rows in held.items())
        return tuple(s for s in old if s.share > 0)

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        return {"old": strength * old_loss(ctx, name)}

    def end(world: World, own: Own) -> tuple[World, Own]:
        rows = capacity if capacity_bytes is None else capacity_bytes // world.tools.row_bytes(world.stage)
        return world, memory.remember(world, own, policy, rows or 0, seed)

    PLANS: dict[str, Callable] = {"dataset": mixed, "after": behind, "joint": beside, "sparse": broken}
    idle = mixing == "joint" and not (strength and (capacity or capacity_bytes))
    parts_: dict[str, Any] = {} if idle else {"init": memory.empty, "plan": plan, "end": end}
    parts_ |= {"loss": loss} if mixing == "joint" and not idle else {}
    keeps = Budget(examples=capacity, bytes=capacity_bytes)
    return Method(name=name, keeps=keeps, hparams={"ratio": ratio}, **parts_)


def old_loss(ctx: Ctx, name: str) -> jax.Array:
    """f32[]: the mean nll of the nested batch ``name``; 0, at no cost, where it holds no target."""
    batch = ctx.batch[name]
    if "old_logp" in batch:
        raise RequestError(f"{name}: mixing 'joint' knows the rows' answers, not rollouts; accepted: dataset, after")

    def mean() -> jax.Array:
        out = ctx.model(ctx.spec, ctx.params, batch, train=True, key=jax.random.fold_in(ctx.key, 1))
        return jnp.sum(batch["weight"] * out.nll) / jnp.maximum(jnp.sum(batch["weight"]), 1.0)

    return jax.lax.cond(jnp.any(batch["weight"] > 0), mean, lambda: jnp.zeros((), jnp.float32))


def parts(phase: Phase, old: tuple[Stream, ...], world: World, every: int, name: str) -> list[Phase]:
    """The phase cut after every ``every`` rows of its main streams, with a phase of old rows behind every whole part.

    RequestError for a phase that counts steps: rows are what is counted here."""
    if phase.steps is not None:
        raise RequestError(f"{name}: mixing 'sparse' counts rows; give epochs, not steps ({phase.steps})")
    rng, main = host_rng(world.key), [s for s in phase.streams if s.into == "main" and isinstance(s.rows, np.ndarray)]
    if len(main) != 1 or main[0].share != 1.0 or phase.epochs != int(phase.epochs):
        raise RequestError(f"{name}: mixing 'sparse' cuts one stream of whole epochs; list it before others that mix")
    order = np.concatenate([rng.permutation(main[0].rows) for _ in range(int(phase.epochs))])
    others = tuple(s for s in phase.streams if s is not main[0])
    out: list[Phase] = []
    for at in range(0, len(order), every):
        rows = order[at : at + every]
        streams = (dataclasses.replace(main[0], rows=rows), *others)
        kept = phase.reset_opt and not out
        out.append(dataclasses.replace(phase, streams=streams, epochs=1.0, reset_opt=kept))
        if len(rows) == every:
            out.append(Phase(name, None, (*old, *others), reset_opt=False))
    return out
