"""Banks of experts and their routers beside dense kernels: adding them, making room. See `jaxcl.models.experts`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.paths import concrete, is_stacked, layer_shape
from jaxcl.core.types import Params
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.surgery.edit import Edit, Origin

ROUTER = ("expert_router", "expert_bias")
AXES = {"expert_a": 3, "expert_b": 3, "expert_router": 2, "expert_bias": 1}
"""How many axes a layer's tensor has; the experts' is the first."""


def add_experts(
    params: Params, sites: Sequence[str], rank: int, scale: float, opened: int, room: int, key: jax.Array, old: bool
) -> Params:
    """``params`` with ``room`` experts and a router at each site, the first ``opened`` of them open. Nothing changes at
    first, as B is 0. old: with a copy of the router. RequestError: a rank above a site's width."""
    out = dict(params)
    for site in sites:
        width = min(layer_shape(site, params[site + "/kernel"]))
        if not 1 <= rank <= width:
            raise RequestError(f"rank {rank} at {site!r}: accepted: 1 to {width}, the site's smaller width")
        if site + "/expert_a" in params:
            raise KeyTaken(f"{site!r} has experts already", site + "/expert_a")
        made = {
            **drawn(params, site, rank, room, key),
            "expert_bias": jnp.where(jnp.arange(room) < opened, 0, -jnp.inf),
        }
        lead = params[site + "/kernel"].shape[:1] if is_stacked(site) else ()
        made["expert_bias"] = jnp.broadcast_to(made["expert_bias"], (*lead, room)).astype(jnp.float32)
        made["expert_scale"] = jnp.full(lead, scale, jnp.float32)
        if old:
            made |= {f"{part}_old": made[part] + 0.0 for part in ROUTER}
        out |= {f"{site}/{name}": value for name, value in made.items()}
    return out


def drawn(params: Params, site: str, rank: int, room: int, key: jax.Array) -> Params:
    """Fresh A f32[N,r,in] and router f32[N,in], U(-1/sqrt(in), 1/sqrt(in)) as torch's linear layers, and B = 0."""
    wide, out = layer_shape(site, params[site + "/kernel"])

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        rows = []
        for path in concrete(f"{site}/{name}"):  # a key of its own name, so that stacking changes no number
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            rows.append(jax.random.uniform(own, shape, jnp.float32, -(wide**-0.5), wide**-0.5))
        return jnp.stack(rows) if is_stacked(site) else rows[0]

    a, router = draw("expert_a", (room, rank, wide)), draw("expert_router", (room, wide))
    return {"expert_a": a, "expert_router": router, "expert_b": jnp.zeros((*a.shape[:-2], out, rank), jnp.float32)}


def doubled(params: Params, sites: Sequence[str], key: jax.Array) -> Edit:
    """The Edit after which every site has twice as much room, the new experts closed: the same function."""
    moved = {}
    for site in sites:
        rank, room = params[site + "/expert_a"].shape[-2], params[site + "/expert_bias"].shape[-1]
        index = np.where(np.arange(2 * room) < room, np.arange(2 * room), -1)
        fills = {**drawn(params, site, rank, 2 * room, key), "expert_bias": -jnp.inf}
        for name, axes in AXES.items():
            for path in (f"{site}/{name}", f"{site}/{name}_old"):
                if path in params:
                    moved[path] = Origin(((path, None),), axes, index={-axes: index}, fill=fills[name])
    return Edit(moved=moved)
