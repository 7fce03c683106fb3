"""InfLoRA: incremental LoRA whose input directions are designed, not trained, so that old inputs do not meet them.

Card cft/inflora; Liang and Li, CVPR 2024. At a stage's start A [r, in] of every site becomes the leading directions of
the stage's inputs outside the subspace of all past inputs, over sqrt 3, and stays; B alone trains. At its end that
subspace grows (`jaxcl.surgery.subspace`). For an input of the subspace the new adapter gives 0: to first order, old
tasks see no change. A and B are the reference code's; the paper has their names swapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.paths import concrete, is_stacked
from jaxcl.core.types import Batch, Method, Own, Params, World, method
from jaxcl.errors import RequestError
from jaxcl.methods.decoder_only import decoder_only
from jaxcl.methods.inclora import banking, folding
from jaxcl.methods.lora import TARGETS
from jaxcl.surgery.edit import restart
from jaxcl.surgery.subspace import Subspace, directions, grown, nothing

Moments = dict[str, np.ndarray]


@method
def inflora(
    rank: int = 10,
    targets: Sequence[str] = TARGETS,
    share: float = 0.95,
    share_end: float = 1.0,
    stages: int = 10,
    rows: int | None = None,
    max_stages: int = 16,
    fold: bool = False,
    name: str = "inflora",
) -> Method:
    """y = (W + sum_{i<=t} B_i A_i) x; B_t starts at 0 and is all that trains, A_t A_t^T = I/3, A_t M = 0.

    share, share_end: the energy of a stage's inputs that is kept, from ``share`` in the first of ``stages`` to nearly
    ``share_end`` in the last (eps_t = share + (share_end - share) t / stages). rows: training rows that the second
    moments of inputs are taken over, at both ends of a stage; None is all of them, as in the paper. max_stages, fold:
    see `jaxcl.methods.inclora.inclora`. Defaults: the paper's for CIFAR-100; its sites were keys and values. There is
    no dropout, as in the reference. Where past inputs leave fewer than ``rank`` directions, the rows of A beyond them
    are zero. Raises RequestError for a share outside (0, 1], a rank above a site's width, layers that another method
    moves.
    """
    if not 0 < share <= share_end <= 1:
        raise RequestError(f"inflora: share {share}, share_end {share_end}; accepted: 0 < share <= share_end <= 1")
    if stages < 1 or (rows is not None and rows < 1):
        raise RequestError(f"inflora: stages {stages}, rows {rows}; accepted: at least 1, rows also null")
    banked = banking(rank, 1.0, 0.0, targets, max_stages)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        decoder_only(world.spec, name, "has other tokens in each stack")
        world, own = banked(world, own)
        where, found = own["host"]["sites"], moments(world, own["host"]["sites"], rows)
        old = subspaces(own, found)
        designed = {n: directions(old[n], c, rank) / 3**0.5 for n, c in found.items()}
        a = {s + "/lora_a": jnp.asarray(stacked(s, designed), jnp.float32) for s in where}
        b = {s + "/lora_b": jnp.zeros_like(world.params[s + "/lora_b"]) for s in where}
        return restart(world, a | b), own

    def end(world: World, own: Own) -> tuple[World, Own]:
        host, found = own["host"], moments(world, own["host"]["sites"], rows)
        wanted = min(share + (share_end - share) * world.stage / stages, share_end)
        old = {n: grown(s, found[n], wanted) for n, s in subspaces(own, found).items()}
        taken = float(np.mean([s.dimension / len(s.basis) for s in old.values()]))
        world = world._replace(notes={**world.notes, name: {"taken": taken}})
        return world, {**own, "host": {**host, "old": {n: s._asdict() for n, s in old.items()}}}

    def mask(world: World, own: Own) -> dict[str, bool]:
        stay(world, own["host"]["sites"], name)
        return {k: k.endswith("/lora_b") for k in world.params}

    return Method(name=name, begin=begin, mask=mask, fold=folding(fold, 0.0), end=end, kinds={"sites": "sites"})


def stay(world: World, where: Sequence[str], name: str) -> None:
    """RequestError where a surgery of this stage moved or grew what is at the sites: its past inputs are not known."""
    kernels = {site + "/kernel" for site in where}
    for edit in world.edits:
        if kernels & (edit.moved.keys() | edit.sources):
            raise RequestError(f"{name!r} knows the inputs of layers that {edit.by!r} moves or grows; choose one")


def subspaces(own: Own, found: Moments) -> dict[str, Subspace]:
    """{single-layer site: the subspace of its past inputs}."""
    old = own["host"].get("old")
    if old is None:
        return {site: nothing(len(c)) for site, c in found.items()}
    return {site: Subspace(np.asarray(old[site]["basis"]), bool(old[site]["complement"])) for site in found}


def moments(world: World, where: Sequence[str], rows: int | None) -> Moments:
    """{single-layer site: mean of h h^T f64[in, in]} over the tokens of the stage's rows, padding left out."""
    names = tuple(n for site in where for n in concrete(site))
    total = jax.tree.map(np.asarray, world.tools.mean(second_moment(names), rows, world.key))
    return {n: total["sum"][n].astype(np.float64) / total["tokens"] for n in names}


@functools.cache
def second_moment(names: tuple[str, ...]) -> Callable[..., Any]:
    """A function for `Tools.mean`, one object per tuple of sites: sums over a row's tokens, and how many there are."""
    taps = tuple(f"{n}:in" for n in names)

    def of_row(forward: Any, train: Params, batch: Batch, key: jax.Array) -> Any:
        real = (batch["segments"] > 0).astype(jnp.float32)
        seen = forward(train, batch, taps=taps).taps
        inputs = {n: seen[tap].astype(jnp.float32) * real[..., None] for n, tap in zip(names, taps, strict=True)}
        return {"sum": {n: jnp.einsum("bti,btj->ij", h, h) for n, h in inputs.items()}, "tokens": jnp.sum(real)}

    return of_row


def stacked(site: str, designed: Moments) -> np.ndarray:
    """A [r, in] of a site, or [R, r, in] of a stack of layers."""
    rows = [designed[n] for n in concrete(site)]
    return np.stack(rows) if is_stacked(site) else rows[0]
