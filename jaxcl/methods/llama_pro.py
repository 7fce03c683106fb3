"""LLaMA Pro: new blocks between frozen ones. Card cpt/llama-pro.

Wu et al., ACL 2024: copies whose output projections are zero change nothing at first; only they train.
"""

from __future__ import annotations

from jaxcl.core.paths import concrete
from jaxcl.core.types import Method, Own, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.surgery.depth import Layer, deepen, grouped

EXPAND = ("each", "first")


@method
def llama_pro(groups: int = 8, per_group: int = 1, expand: str = "each", name: str = "llama_pro") -> Method:
    """Divides the layers into ``groups`` and puts copies of the top ``per_group`` layers on top of each; trains every
    tensor of the copies and nothing else. The frozen blocks' weight gradients are not computed.

    expand: at ``each`` stage (the copies of stages before are frozen with the rest), or at the ``first`` only (the
    same copies train on). Defaults: N 8, P 1. Give the optimizer a mask where norms should have no weight decay.
    One compilation per expansion. Raises RequestError for layers that the groups do not divide, an unknown expand.
    """
    if expand not in EXPAND:
        raise unknown("expand", expand, EXPAND, where="llama_pro")
    if groups < 1 or per_group < 1:
        raise RequestError(f"llama_pro: groups {groups}, per_group {per_group}; accepted: whole numbers above 0")

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own and expand == "first":
            return world, own
        given = [-1] * world.spec.layers
        before = own["host"] if own else {"origin": given, "stage_added": given}
        order = grouped(world.spec.layers, groups, per_group)
        origin = [layer.source if layer.copy else before["origin"][layer.source] for layer in order]
        added = [world.stage if layer.copy else before["stage_added"][layer.source] for layer in order]
        return deepen(world, order, silent=True), {"host": {"origin": renumbered(origin, order), "stage_added": added}}

    def mask(world: World, own: Own) -> dict[str, bool]:
        newest = max(own["host"]["stage_added"])
        new = {i for i, stage in enumerate(own["host"]["stage_added"]) if stage == newest}
        return {k: k.startswith("layers/") and _layer(k) in new for k in world.params}

    return Method(name=name, begin=begin, mask=mask)


def renumbered(origin: list[int], order: list[Layer]) -> list[int]:
    """Sources of copies as numbers of layers in the deeper model; -1 for layers that were there from the start."""
    now = {layer.source: i for i, layer in enumerate(order) if not layer.copy}
    return [now[source] if source >= 0 else -1 for source in origin]


def _layer(path: str) -> int:
    """Number of the (first) layer that a key belongs to."""
    return int(concrete(path)[0].split("/")[1])
