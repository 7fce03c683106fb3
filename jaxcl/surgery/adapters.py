"""LoRA keys beside dense kernels: adding, banking, merging. Pure functions on the flat dict.

A site ``s`` has ``s/kernel`` [in, out]; its adapter is ``s/lora_a`` [r, in], ``s/lora_b`` [out, r],
``s/lora_scale`` []; a bank of frozen ones ``s/bank_a`` [S, r, in], ``s/bank_b`` [S, out, r], ``s/bank_scale`` [].
A stacked site has the layers' axis in front of each. Sources: Hu et al. 2022; the bank is O-LoRA's concatenation
with static shapes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.core.paths import concrete, is_stacked, layer_shape
from jaxcl.core.types import Params
from jaxcl.errors import KeyTaken, RequestError


def _lead(params: Params, site: str) -> tuple[int, ...]:
    return params[site + "/kernel"].shape[:1] if is_stacked(site) else ()


def fresh_a(params: Params, sites: Sequence[str], rank: int, key: jax.Array) -> Params:
    """{site/lora_a: f32[r, in]} by Kaiming-uniform(a=sqrt 5), which is U(-1/sqrt(in), 1/sqrt(in)).

    Every layer and site draws with a key of its own name, so that stacking changes no number.
    """
    out: Params = {}
    for site in sites:
        width = layer_shape(site, params[site + "/kernel"])[0]
        bound = 1.0 / width**0.5
        draw = lambda k, w=width, b=bound: jax.random.uniform(k, (rank, w), jnp.float32, -b, b)  # noqa: E731
        drawn = [draw(jax.random.fold_in(key, zlib.crc32(name.encode()))) for name in concrete(site)]
        out[site + "/lora_a"] = jnp.stack(drawn) if is_stacked(site) else drawn[0]
    return out


def zero_b(params: Params, sites: Sequence[str], rank: int) -> Params:
    """{site/lora_b: zeros f32[out, r]}, so that a fresh adapter changes nothing."""
    out: Params = {}
    for site in sites:
        width = layer_shape(site, params[site + "/kernel"])[1]
        out[site + "/lora_b"] = jnp.zeros((*_lead(params, site), width, rank), jnp.float32)
    return out


def add_lora(params: Params, sites: Sequence[str], rank: int, scale: float, key: jax.Array) -> Params:
    """``params`` with a fresh adapter at each site. RequestError: a rank above a site's width, a site that has one."""
    for site in sites:
        width = min(layer_shape(site, params[site + "/kernel"]))
        if not 1 <= rank <= width:
            raise RequestError(f"rank {rank} at {site!r}: accepted: 1 to {width}, the site's smaller width")
        if site + "/lora_a" in params:
            taken = site + "/lora_a"
            raise KeyTaken(f"{site!r} has an adapter already; adapter methods cannot share a site", taken)
    scales = {s + "/lora_scale": jnp.full(_lead(params, s), scale, jnp.float32) for s in sites}
    return {**params, **fresh_a(params, sites, rank, key), **zero_b(params, sites, rank), **scales}


def add_bank(params: Params, sites: Sequence[str], slots: int) -> Params:
    """``params`` with an empty bank of ``slots`` adapters at each site that has a live one; zeros are exact."""
    out = dict(params)
    for s in sites:
        for letter in "ab":
            live = params[f"{s}/lora_{letter}"]
            lead = _lead(params, s)
            out[f"{s}/bank_{letter}"] = jnp.zeros((*lead, slots, *live.shape[len(lead) :]), live.dtype)
        out[s + "/bank_scale"] = params[s + "/lora_scale"] + 0.0
    return out


def to_bank(params: Params, sites: Sequence[str], slot: int) -> Params:
    """{bank key: new value} with the live adapter copied to ``slot``; the bank doubles when it is full."""
    out: Params = {}
    for s in sites:
        axis = len(_lead(params, s))
        for letter in "ab":
            bank, live = params[f"{s}/bank_{letter}"], params[f"{s}/lora_{letter}"]
            if slot >= bank.shape[axis]:
                bank = jnp.concatenate([bank, jnp.zeros_like(bank)], axis)
            out[f"{s}/bank_{letter}"] = bank.at[(slice(None),) * axis + (jnp.asarray(slot),)].set(live)
    return out


def delta(params: Params, site: str, prefix: str = "lora") -> jax.Array:
    """The kernel [in, out] that a live adapter (``lora``) or the sum of a bank (``bank``) adds, in f32."""
    a = params[f"{site}/{prefix}_a"].astype(jnp.float32)
    b = params[f"{site}/{prefix}_b"].astype(jnp.float32)
    scale = params[f"{site}/{prefix}_scale"].astype(jnp.float32)
    equation = "...sri,...sor->...io" if prefix == "bank" else "...ri,...or->...io"
    return jnp.einsum(equation, a, b) * scale[..., None, None]


def fold_banks(params: Params, sites: Sequence[str]) -> Params:
    """``params`` with every bank added to its kernel, f32, and nothing left of it but ``bank_a``, which penalties read.

    The forward pass then costs what it does without a bank; it is the same up to rounding. RequestError for a kernel
    that is not float32: small deltas would be lost.
    """
    out = dict(params)
    for s in sites:
        if params[s + "/kernel"].dtype != jnp.float32:
            found = params[s + "/kernel"].dtype
            raise RequestError(f"fold: {s!r} is of {found}, which loses small deltas; accepted: float32 weights")
        bank = {f"{s}/bank_{part}": params[f"{s}/bank_{part}"] for part in ("a", "b", "scale")}
        out[s + "/kernel"] = _with_bank(params[s + "/kernel"], *bank.values())
        for key in (s + "/bank_b", s + "/bank_scale"):
            del out[key]
    return out


@jax.jit
def _with_bank(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return kernel + delta({"s/bank_a": a, "s/bank_b": b, "s/bank_scale": scale}, "s", "bank")


def merge(params: Params, sites: Sequence[str]) -> Params:
    """Kernels with all their adapters added, adapter keys gone. Computed in f32.

    Raises RequestError for a bf16 kernel: small deltas would be lost; keep an f32 master.
    """
    out = dict(params)
    for s in sites:
        kernel = params[s + "/kernel"]
        if kernel.dtype != jnp.float32:
            raise RequestError(f"merging into {s!r} of {kernel.dtype} loses small deltas; merge into float32")
        for prefix in ("lora", "bank"):
            if f"{s}/{prefix}_a" in params:
                kernel = kernel + delta(params, s, prefix)
                for part in ("a", "b", "scale"):
                    out.pop(f"{s}/{prefix}_{part}")
        out[s + "/kernel"] = kernel
    return out
