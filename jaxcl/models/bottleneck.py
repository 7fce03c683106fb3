"""Bottleneck adapters at a block's sub-layers (Houlsby et al. 2019; Pfeiffer et al. 2020; parallel: He et al. 2022).

``attn/adapter_*`` and ``mlp/adapter_*``: y += relu(y D + b) U + c on what the sub-layer gives, before its norm, if it
has one there, and before it is added to the residual stream. ``attn/parallel_*``, ``mlp/parallel_*``: y += s (relu(x D
+ b) U + c) with x what the sub-layer reads. D ``_down`` [d, m], b ``_down_bias`` [m], U ``_up`` [m, d], c ``_up_bias``
[d], s ``parallel_scale`` []. All but s may have the rows of a batch in front, [B, ..], each row its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

PARTS = ("down", "down_bias", "up", "up_bias")
SEQUENTIAL, PARALLEL = (tuple(f"{kind}_{part}" for part in PARTS) for kind in ("adapter", "parallel"))
SCALE = "parallel_scale"


class Bottleneck(nnx.Module):
    """The adapters of one sub-layer, if it has any."""

    def __init__(self, view: Mapping[str, jax.Array]):
        for name in (*SEQUENTIAL, *PARALLEL, SCALE):
            if name in view:
                setattr(self, name, nnx.Param(view[name]))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The sub-layer's output y [B,T,d] for its input x [B,T,d], adapted."""
        if hasattr(self, PARALLEL[0]):
            scale = getattr(self, SCALE)[...].astype(y.dtype)
            y = y + scale * self.through(PARALLEL, x)
        return y + self.through(SEQUENTIAL, y) if hasattr(self, SEQUENTIAL[0]) else y

    def through(self, names: tuple[str, ...], x: jax.Array) -> jax.Array:
        """relu(x D + b) U + c."""
        down, b, up, c = (getattr(self, name)[...].astype(x.dtype) for name in names)
        if b.ndim == 2:  # each row's own
            b, c = b[:, None], c[:, None]
        return jax.nn.relu(x @ down + b) @ up + c
