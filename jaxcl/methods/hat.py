"""HAT: hard attention to the task, on the hidden units of the MLPs. Card cft/hat.

Serra, Suris, Miron, Karatzoglou, ICML 2018. Task t has an embedding e per layer; its mask a = sigmoid(s e) multiplies
the hidden units, h <- a h, and what a past task used may not change. Task-incremental: the task must be told in
training and at test, see `jaxcl.til`.

What trains: the embeddings, and gate, up and down of the masked MLPs. The residual stream belongs to every task, so
its side counts as used: a unit's weights are protected by the unit's own A. Attention, norms, embedding table and
head have no units that could be masked; they are frozen, so that a past task's outputs stay as they were.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.paths import concrete, is_stacked, layer_shape, per_tensor, sites
from jaxcl.core.processes import host
from jaxcl.core.types import Apply, Batch, Clock, Ctx, GradFn, Method, Outputs, Own, Params, Phase, World, method
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.methods.tasks import UNTOLD, check_told
from jaxcl.surgery.edit import restart
from jaxcl.transforms.hat import anneal, bounded, compensate, protect, soft_step, sparsity

LIVE, BANK = "/hat_e", "/hat_bank"  # f32[units] of the task in training, f32[S, units] of task t in slot t


@method
def hat(
    s_max: float = 400.0,
    strength: float = 0.75,
    targets: Sequence[str] = ("mlp/down",),
    sweeps: int = 1,
    max_stages: int = 16,
    name: str = "hat",
) -> Method:
    """Adds strength * sum a (1 - A) / sum (1 - A), and scales updates by 1 - A. Defaults: the paper's, for vision.

    s_max: steepness at test; within a phase s rises from 1/s_max to it, batch by batch, ``sweeps`` times: give the
    number of epochs to anneal within each, as the paper does. targets: MLPs by their ``down``. A task that is not yet
    learned, or none (`til.NO_TASK`), has every unit. Rows of a past task have its mask at s_max, and a teacher (lwf)
    knows no mask for the new task: let it teach old rows. The share of used units of every layer is in metrics.json.
    Raises RequestError for s_max below 1, a negative strength, sweeps or max_stages below 1, a target that is no MLP's
    ``down``, rows without ``task_id``, and company that trains what cannot be protected (adapters, new layers).
    """
    if s_max < 1 or strength < 0 or sweeps < 1 or max_stages < 1:
        given = f"s_max {s_max}, strength {strength}, sweeps {sweeps}, max_stages {max_stages}"
        raise RequestError(f"hat: {given}; accepted: s_max >= 1, strength >= 0, sweeps >= 1, max_stages >= 1")

    def steepness(clock: Clock) -> jax.Array:
        return anneal(clock.phase_step, clock.phase_len, s_max, sweeps)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        check_told(world, name)
        if world.stage >= max_stages:
            raise RequestError(f"hat: stage {world.stage + 1} exceeds max_stages={max_stages}; raise it")
        if own is None:
            where = masked_sites(world.params, targets)
            params = {**world.params, **fresh(world, where), **empty_banks(world.params, where, max_stages)}
            used = {s + LIVE: jnp.zeros_like(params[s + LIVE]) for s in where}
            return world._replace(params=params), {"fixed": {"used": used}}
        where = [k.removesuffix(LIVE) for k in own["fixed"]["used"]]
        moved = {s + BANK: kept(world.params, s, world.stage - 1) for s in where}
        world = world._replace(params={**world.params, **moved})
        return restart(world, fresh(world, where)), own

    def mask(world: World, own: Own) -> dict[str, bool]:
        free = trainable(own, world.params)
        return {k: k in free for k in world.params}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        """Nothing is planned; company that trains what cannot be protected is refused, whoever came first."""
        for key in sorted(world.trained - trainable(own, world.params)):
            other = world.owner.get(key, "another")
            raise RequestError(
                f"methods {other!r} and {name!r} do not go together: {key!r} trains through all stages and has no "
                "units that could be protected"
            )
        return phases

    def end(world: World, own: Own) -> tuple[World, Own]:
        used = {k: jnp.maximum(a, soft_step(s_max * world.params[k])) for k, a in own["fixed"]["used"].items()}
        return world._replace(notes={**world.notes, name: {"used": shares(used)}}), {"fixed": {"used": used}}

    def wrap(apply: Apply, own: Own, clock: Clock) -> Apply:
        def masked(spec: Any, params: Params, batch: Batch, *, train: bool = False, **kw: Any) -> Outputs:
            if "task_id" not in batch:
                raise RequestError(f"method {name!r} {UNTOLD}")
            s = steepness(clock) if train else s_max
            scales: Params = {}
            for site in (k.removesuffix(LIVE) for k in params if k.endswith(LIVE)):
                pick = lambda e, bank, s=s: masks(e, bank, batch["task_id"], clock.stage, s, s_max)  # noqa: E731
                scale = per_tensor(pick, site, params[site + LIVE], params[site + BANK])
                old = params.get(site + "/in_scale")
                scales[site + "/in_scale"] = scale if old is None else scale * old[..., None, :]
            return apply(spec, {**params, **scales}, batch, train=train, **kw)

        return masked

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        used, s = ctx.own["fixed"]["used"], steepness(ctx.clock)
        return {"sparsity": strength * sparsity({k: soft_step(s * ctx.params[k]) for k in used}, used)}

    def grad(grad_fn: GradFn, own: Own, clock: Clock) -> GradFn:
        def compensated(train: Params, batch: Batch, key: jax.Array, *, terms: bool = True) -> tuple:
            grads, aux = grad_fn(train, batch, key, terms=terms)
            ours = own["fixed"]["used"].keys() & grads.keys()
            s = steepness(clock)
            return {**grads, **{k: compensate(grads[k], train[k], s, s_max) for k in sorted(ours)}}, aux

        return compensated

    def project(updates: Params, params: Params, own: Own, clock: Clock) -> Params:
        out = dict(updates)
        for path, used in own["fixed"]["used"].items():
            for key, fn in guards(path.removesuffix(LIVE)).items():
                if key in out:
                    out[key] = per_tensor(fn, key, out[key], used)
            if path in out:
                out[path] = bounded(out[path], params[path])
        return out

    return Method(
        name=name, packs=False, kinds={"used": "mask"}, begin=begin, mask=mask, plan=plan, end=end,
        wrap=wrap, loss=loss if strength else None, grad=grad, project=project,
    )  # fmt: skip


def masks(
    live: jax.Array, bank: jax.Array, task: jax.Array, stage: Any, s: jax.Array | float, s_max: float
) -> jax.Array:
    """f32[B, units]: the mask of every row's task i32[B]. Past tasks come from the bank at s_max, the present one from
    ``live`` at s, those to come have every unit."""
    past = soft_step(s_max * bank[jnp.clip(task, 0, bank.shape[0] - 1)])
    known = jnp.where((task == stage)[:, None], soft_step(s * live), past)
    return jnp.where(((task >= 0) & (task <= stage))[:, None], known, 1.0)


def guards(site: str) -> dict[str, Any]:
    """{key of a weight around the hidden units of ``site``: fn(update, used)}; the residual stream is always used."""

    def into(u: jax.Array, used: jax.Array) -> jax.Array:
        return protect(u, jnp.ones(u.shape[0]), used)

    def out_of(u: jax.Array, used: jax.Array) -> jax.Array:
        return protect(u, used, jnp.ones(u.shape[1]))

    def bias(u: jax.Array, used: jax.Array) -> jax.Array:
        return protect(u[None], jnp.ones(1), used)[0]

    mlp = site.rpartition("/")[0]
    sources = {f"{mlp}/{n}/{k}": fn for n in ("gate", "up") for k, fn in (("kernel", into), ("bias", bias))}
    return {**sources, site + "/kernel": out_of}


def trainable(own: Own, params: Mapping[str, Any]) -> set[str]:
    """The live embeddings and what they protect."""
    live = own["fixed"]["used"].keys()
    return {*live, *(k for path in live for k in guards(path.removesuffix(LIVE)) if k in params)}


def masked_sites(params: Params, targets: Sequence[str]) -> list[str]:
    """The ``down`` sites that ``targets`` name. RequestError: another site; KeyTaken: one that has a mask."""
    where = sites(params, targets)
    for site in where:
        mlp, _, last = site.rpartition("/")
        if last != "down" or any(f"{mlp}/{n}/kernel" not in params for n in ("gate", "up")):
            raise RequestError(f"hat: target {site!r} is no down projection of a gated MLP; accepted: mlp/down")
        if site + LIVE in params:
            raise KeyTaken(f"{site!r} has a mask already", site + LIVE)
    return where


def fresh(world: World, where: Sequence[str]) -> Params:
    """{site/hat_e: N(0, 1)}; every layer draws with a key of its own name, so that stacking changes no number."""
    out: Params = {}
    for site in where:
        units = layer_shape(site, world.params[site + "/kernel"])[:1]
        keys = [jax.random.fold_in(world.key, zlib.crc32(layer.encode())) for layer in concrete(site)]
        drawn = [jax.random.normal(key, units, jnp.float32) for key in keys]
        out[site + LIVE] = jnp.stack(drawn) if is_stacked(site) else drawn[0]
    return out


def empty_banks(params: Params, where: Sequence[str], max_stages: int) -> Params:
    """{site/hat_bank: zeros f32[S, units]} with room for every stage but the last."""
    slots = max(max_stages - 1, 1)
    shapes = {s: params[s + "/kernel"].shape[:-1] for s in where}
    return {s + BANK: jnp.zeros((*shape[:-1], slots, shape[-1]), jnp.float32) for s, shape in shapes.items()}


def kept(params: Params, site: str, task: int) -> jax.Array:
    """The site's bank with the live embedding in the slot of ``task``."""
    return params[site + BANK].at[..., task, :].set(params[site + LIVE])


def shares(used: Mapping[str, jax.Array]) -> dict[str, float]:
    """{site of one layer: share of its units that past tasks use}: when it nears 1, nothing more can be learned."""
    out: dict[str, float] = {}
    for path, value in used.items():
        rows = host(value).astype(np.float64).reshape(len(concrete(path)), -1)
        out |= {p.removesuffix(LIVE): round(float(r.mean()), 4) for p, r in zip(concrete(path), rows)}
    return out
