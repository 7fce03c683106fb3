"""Incremental LoRA: a fresh adapter per stage, the old ones frozen and added. Card cft/lora (IncLoRA).

The live adapter moves into the bank in the *next* stage's `begin`; at `end` it would count twice in the evaluation
that follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxcl.core.types import Method, Own, World, method
from jaxcl.errors import RequestError
from jaxcl.methods.lora import TARGETS, Hook, attach, freeze_base, fresh_slot, lora_scale
from jaxcl.surgery.adapters import add_bank, to_bank


@method
def inclora(
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
    max_stages: int = 16,
    name: str = "inclora",
) -> Method:
    """y = W x + s sum_{i<=t} B_i A_i x, only (A_t, B_t) trained. s uses the rank of one adapter.

    max_stages: the bank holds max_stages - 1 adapters and doubles, with one new compilation, beyond that.
    Other arguments and errors: see `jaxcl.methods.lora.lora`.
    """
    begin = banking(rank, lora_scale(rank, alpha, rslora), dropout, targets, max_stages)
    return Method(name=name, begin=begin, mask=freeze_base, kinds={"sites": "sites"})


def banking(rank: int, scale: float, dropout: float, targets: Sequence[str], max_stages: int) -> Hook:
    """The `begin` of IncLoRA and O-LoRA: adapter and empty bank first, later the adapter goes into the bank."""
    if max_stages < 1:
        raise RequestError(f"max_stages is {max_stages}; accepted: a whole number of at least 1")

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if not own:
            world, own = attach(world, rank, scale, dropout, targets)
            params = add_bank(world.params, own["host"]["sites"], max(max_stages - 1, 1))
            return world._replace(params=params), {"host": {**own["host"], "used": 0}}
        where, used = own["host"]["sites"], own["host"]["used"]
        world = world._replace(params={**world.params, **to_bank(world.params, where, used)})
        return fresh_slot(world, where, rank), {**own, "host": {"sites": where, "used": used + 1}}

    return begin
