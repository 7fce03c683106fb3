"""O-LoRA: incremental LoRA whose new input directions avoid the old ones. Card cft/o-lora.

Wang et al., Findings of EMNLP 2023. The loss gets strength * R_orth + norm_strength * R_norm, with R_orth = sum over
sites of |A_old A^T| entrywise (``l1``, the reference code) or of its squares (``l2sq``, the paper), and R_norm = sum
over sites of ||A||_F + ||B||_F.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.core.paths import sites
from jaxcl.core.types import Ctx, Method, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.penalties import frobenius, orthogonality
from jaxcl.methods.inclora import banking, folding
from jaxcl.methods.lora import TARGETS, freeze_base, lora_scale

NORMS = ("l1", "l2sq")


@method
def olora(
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    strength: float = 0.5,
    norm_strength: float = 0.0,
    norm: str = "l1",
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
    max_stages: int = 16,
    fold: bool = False,
    name: str = "olora",
) -> Method:
    """IncLoRA plus the orthogonality penalty; defaults are the reference code's for orders 1 to 3 on T5-large.

    Only A feels R_orth; the bank is frozen, empty slots are zeros and cost nothing. With both strengths 0 this is
    IncLoRA bit for bit. fold: see `jaxcl.methods.inclora.folding`. Raises RequestError for a negative strength, an
    unknown norm; see `inclora` for the rest.
    """
    for key, value in (("strength", strength), ("norm_strength", norm_strength)):
        if value < 0:
            raise RequestError(f"olora: {key} is {value}; accepted: 0 or more")
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS, where="olora")

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        # Its own: other adapters may sit elsewhere, and layers that grew later have none.
        where = [s for s in sites(ctx.params, targets) if s + "/bank_a" in ctx.params]
        named: dict[str, jax.Array] = {}
        if strength:
            pairs = ((ctx.params[s + "/lora_a"], ctx.params[s + "/bank_a"]) for s in where)
            named["orthogonality"] = strength * jnp.asarray(sum(orthogonality(a, bank, norm) for a, bank in pairs))
        if norm_strength:
            sizes = (frobenius(ctx.params[f"{s}/lora_{x}"]) for s in where for x in "ab")
            named["norm"] = norm_strength * jnp.asarray(sum(sizes))
        return named

    begin = banking(rank, lora_scale(rank, alpha, rslora), dropout, targets, max_stages)
    term = loss if strength or norm_strength else None
    kinds, fixed = {"sites": "sites"}, folding(fold, dropout)
    return Method(name=name, begin=begin, mask=freeze_base, fold=fixed, loss=term, kinds=kinds)
