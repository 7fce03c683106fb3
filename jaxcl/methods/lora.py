"""LoRA through all stages with one adapter (SeqLoRA), or merged into the base after each stage. Card cft/lora.

Hu et al. 2022; rank-stabilised scale: Kalajdzievski 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxcl.core.paths import sites
from jaxcl.core.types import Method, Own, World, method
from jaxcl.errors import RequestError
from jaxcl.surgery.adapters import add_lora, fresh_a, merge, zero_b
from jaxcl.surgery.edit import restart

TARGETS = ("attn/q", "attn/v")


@method
def lora(
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
    merged: bool = False,
    name: str = "lora",
) -> Method:
    """Freezes the base and trains y += s B A dropout(x) at the target sites, s = alpha/rank (rslora: alpha/sqrt rank).

    targets: sites by pattern (``attn/q``, ``layers/3/mlp/*``). merged: at a stage's end the adapter is added to the
    kernels in f32 and starts afresh, so that nothing grows. Defaults: the O-LoRA code's (rank 8, alpha 32, q and v).
    Raises RequestError for a rank above a site's width, an unknown target, dropout outside [0, 1).
    """
    scale = lora_scale(rank, alpha, rslora)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        return (world, own) if own else attach(world, rank, scale, dropout, targets)

    def end(world: World, own: Own) -> tuple[World, Own]:
        where = own["host"]["sites"]
        scales = {k: v for k, v in world.params.items() if k.endswith("/lora_scale")}
        merged_in = world._replace(params=merge(world.params, where) | scales)
        return fresh_slot(merged_in, where, rank), own

    return Method(name=name, begin=begin, mask=freeze_base, end=end if merged else None, kinds={"sites": "sites"})


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha/rank, or alpha/sqrt(rank)."""
    if rank < 1 or alpha <= 0:
        raise RequestError(f"rank {rank} and alpha {alpha}: accepted: a rank of at least 1, a positive alpha")
    return alpha / (rank**0.5 if rslora else rank)


def attach(world: World, rank: int, scale: float, dropout: float, targets: Sequence[str]) -> tuple[World, Own]:
    """The world with fresh adapters at the targets; the memory lists the sites."""
    spec, where = with_dropout(world.spec, dropout), sites(world.params, targets)
    params = add_lora(world.params, where, rank, scale, world.key)
    return world._replace(params=params, spec=spec), {"host": {"sites": where}}


def with_dropout(spec: Any, dropout: float) -> Any:
    """The spec with dropout on its adapters' inputs; at 0 it stays as it is. RequestError outside [0, 1), or for a
    model that has none."""
    if not 0 <= dropout < 1:
        raise RequestError(f"dropout is {dropout}; accepted: 0 up to but not including 1")
    if not dropout:
        return spec
    if not hasattr(spec, "adapter_dropout"):
        raise RequestError(f"this model has no adapter dropout; set dropout to 0 (it is {dropout})")
    return dataclasses.replace(spec, adapter_dropout=dropout)


def freeze_base(world: World, own: Own) -> dict[str, bool]:
    """Only live adapters train."""
    return {k: k.endswith(("/lora_a", "/lora_b")) for k in world.params}


def fresh_slot(world: World, where: Sequence[str], rank: int) -> World:
    """The live adapter started anew: random A, zero B; every memory of it follows through an Edit."""
    params: Any = dict(world.params)
    return restart(world, {**fresh_a(params, where, rank, world.key), **zero_b(params, where, rank)})


Hook = Callable[[World, Own | None], tuple[World, Own]]
