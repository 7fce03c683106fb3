"""Experts at a dense site: low-rank adapters that a router mixes, token by token (LoRAMoE, Dou et al. 2024).

``expert_a`` [N,r,in], ``expert_b`` [N,out,r], ``expert_scale`` [], ``expert_router`` [N,in], ``expert_bias`` [N]: y +=
sum_e g_e scale B_e A_e x with gates g = softmax(x R^T + bias) in float32. A bias of -inf closes an expert: its gate is
0, and so is every gradient of its own. ``expert_router_old``, ``expert_bias_old``: the router as it was, see drift.

A site's notes: ``experts/mass`` f32[B,N], the sum of the gates over a row's tokens; with an old router
``experts/drift`` f32[B], the sum of KL(old gates || gates). Padding and soft prompts count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from .flow import SiteFlow

NAMES = ("expert_a", "expert_b", "expert_scale", "expert_router", "expert_bias", "expert_router_old", "expert_bias_old")


class Experts(nnx.Module):
    """The experts of one site, if it has any."""

    def __init__(self, view: Mapping[str, jax.Array]):
        for name in NAMES:
            if name in view:
                setattr(self, name, nnx.Param(view[name]))

    def __call__(self, x: jax.Array, y: jax.Array, flow: SiteFlow, site: str) -> jax.Array:
        """y [B,T,out] plus what the experts make of x [B,T,in]."""
        if not hasattr(self, "expert_a"):
            return y
        gates = self.gates(x)
        notes = {"experts/mass": flow.total(gates)}
        if hasattr(self, "expert_router_old"):
            notes["experts/drift"] = flow.total(divergence(self.gates(x, "_old"), gates))
        flow.note(site, notes)
        a, b, scale = (getattr(self, name)[...].astype(x.dtype) for name in NAMES[:3])
        inner = jnp.einsum("bti,nri->btnr", flow.drop(site, x), a) * (gates.astype(x.dtype) * scale)[..., None]
        return y + jnp.einsum("btnr,nor->bto", inner, b)

    def gates(self, x: jax.Array, which: str = "") -> jax.Array:
        """f32[B,T,N], the shares of the experts by the router as it is, or by the ``_old`` one."""
        kernel, bias = (getattr(self, f"expert_{part}{which}")[...] for part in ("router", "bias"))
        return jax.nn.softmax(x.astype(jnp.float32) @ kernel.astype(jnp.float32).T + bias, axis=-1)


def divergence(old: jax.Array, new: jax.Array) -> jax.Array:
    """KL(old || new) f32[...] of gates [..., N]; what is closed in both counts for nothing."""
    log_old, log_new = (jnp.log(jnp.maximum(gates, 1e-30)) for gates in (old, new))
    return jnp.sum(old * (log_old - log_new), axis=-1)
