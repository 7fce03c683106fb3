"""Incremental LoRA: a fresh adapter per stage, the old ones frozen and added. Card cft/lora (IncLoRA).

The live adapter moves into the bank in the *next* stage's `begin`; at `end` it would count twice in the evaluation
that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxcl.core.types import Batch, Method, Own, Params, World, method
from jaxcl.errors import RequestError
from jaxcl.methods.lora import TARGETS, Hook, attach, freeze_base, fresh_slot, lora_scale
from jaxcl.surgery.adapters import add_bank, fold_banks, to_bank


@method
def inclora(
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
    max_stages: int = 16,
    fold: bool = False,
    name: str = "inclora",
) -> Method:
    """y = W x + s sum_{i<=t} B_i A_i x, only (A_t, B_t) trained. s uses the rank of one adapter.

    max_stages: the bank holds max_stages - 1 adapters and doubles, with one new compilation, beyond that. fold: while a
    phase trains, the bank is added to a second copy of the kernels, see `folding`.
    Other arguments and errors: see `jaxcl.methods.lora.lora`.
    """
    begin = banking(rank, lora_scale(rank, alpha, rslora), dropout, targets, max_stages)
    return Method(name=name, begin=begin, mask=freeze_base, fold=folding(fold, dropout), kinds={"sites": "sites"})


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
        return fresh_slot(world, where, rank), {**own, "host": {**own["host"], "used": used + 1}}

    return begin


def folding(fold: bool, dropout: float) -> Callable[[Params, Own, Batch], Params] | None:
    """The `fold` of IncLoRA and O-LoRA: a step costs what it does without a bank, for a second copy of the kernels.

    The bank itself stays in the model: for the penalty, evaluation, checkpoints and export. Rows that weigh the bank
    themselves (``bank_weight``) are not folded. Raises RequestError with dropout, which falls on the bank's input too
    and would not on that of a kernel.
    """
    if not fold:
        return None
    if dropout:
        raise RequestError(f"fold with dropout {dropout}: what is in a kernel has no dropout; accepted: dropout 0")

    def folded(frozen: Params, own: Own, batch: Batch) -> Params:
        # A kernel that another method trains is not here to be added to: its bank stays beside it.
        here = [s for s in own["host"]["sites"] if s + "/kernel" in frozen]
        return frozen if "bank_weight" in batch else fold_banks(frozen, here)

    return folded
