"""One table of a decoder's parameters: path, shape, logical axes. Init, sharding and weight files read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .spec import DecoderSpec

Axes = tuple[str | None, ...]
FACTORS = ("in_scale", "out_scale", "in_delta", "out_delta")  # of a dense site's input and output units

ADDED: dict[str, Axes] = {  # optional keys that belong to no kernel, by the end of their path
    "prompt/rows": (None, "embed"),
    "prompt/mlp_in": ("embed", None),
    "prompt/mlp_out": (None, "embed"),
    "prompt/mlp_out_bias": ("embed",),
    "prompt/mlp_scale": ("embed",),
    "prompt/mlp_bias": ("embed",),
    "idbr/general": ("embed", None),
    "idbr/specific": ("embed", None),
    "attn/prefix_k": (None, "kv"),
    "attn/prefix_v": (None, "kv"),
    "attn/prefix_map": (None, None, "kv"),
    "attn/prefix_map_bias": (None, "kv"),
    **{f"{part}/{kind}_down": ("embed", None) for part in ("attn", "mlp") for kind in ("adapter", "parallel")},
    **{f"{part}/{kind}_up": (None, "embed") for part in ("attn", "mlp") for kind in ("adapter", "parallel")},
    **{f"{part}/{kind}_up_bias": ("embed",) for part in ("attn", "mlp") for kind in ("adapter", "parallel")},
    **{f"{part}_norm/scale_delta": ("embed",) for part in ("attn", "mlp", "attn_post", "mlp_post", "final")},
}


class Leaf(NamedTuple):
    """shape of the tensor; a logical axis name (or None) per dimension; std of its init, None for ones, 0 for zeros."""

    shape: tuple[int, ...]
    axes: Axes
    std: float | None


def layout(spec: DecoderSpec) -> dict[str, Leaf]:
    """{path: Leaf} with every layer on its own, whatever ``spec.segments`` says."""
    d, std, layer = spec.width, spec.init_std, _layer(spec)
    table = {"embed/kernel": Leaf((spec.vocab, d), ("vocab", "embed"), std)}
    for i in range(spec.layers):
        table |= {f"layers/{i}/{path}": leaf for path, leaf in layer.items()}
    table["final_norm/scale"] = Leaf((d,), ("embed",), None)
    if not spec.tied:
        table["head/kernel"] = Leaf((d, spec.vocab), ("embed", "vocab"), std)
    return table


def _layer(spec: DecoderSpec) -> dict[str, Leaf]:
    """{path below ``layers/{i}``: Leaf}, the same for all layers."""
    d, std = spec.width, spec.init_std
    out = std / (2 * spec.layers) ** 0.5  # what adds to the residual stream (GPT-2, section 2.3)
    q, kv = spec.heads * spec.head_dim, spec.kv_width
    table = {
        "attn/q/kernel": Leaf((d, q), ("embed", "heads"), std),
        "attn/k/kernel": Leaf((d, kv), ("embed", "kv"), std),
        "attn/v/kernel": Leaf((d, kv), ("embed", "kv"), std),
        "attn/o/kernel": Leaf((q, d), ("heads", "embed"), out),
        "mlp/gate/kernel": Leaf((d, spec.mlp), ("embed", "mlp"), std),
        "mlp/up/kernel": Leaf((d, spec.mlp), ("embed", "mlp"), std),
        "mlp/down/kernel": Leaf((spec.mlp, d), ("mlp", "embed"), out),
    }
    for site in spec.biases:
        kernel = table[f"{site}/kernel"]
        table[f"{site}/bias"] = Leaf(kernel.shape[1:], kernel.axes[1:], 0.0)
    for place, built in (("norm", "pre"), ("post_norm", "post")):
        if spec.norms in (built, "both"):
            table |= {f"{part}_{place}/scale": Leaf((d,), ("embed",), None) for part in ("attn", "mlp")}
    if spec.qk_norm == "head":
        table |= {f"attn/{name}_norm/scale": Leaf((spec.head_dim,), (None,), None) for name in "qk"}
    if spec.qk_norm == "width":
        table["attn/q_norm/scale"] = Leaf((q,), ("heads",), None)
        table["attn/k_norm/scale"] = Leaf((kv,), ("kv",), None)
    return table


def axes(spec: DecoderSpec, params: Mapping[str, Any]) -> dict[str, Axes]:
    """{path: logical axis name or None per dimension} for every key of ``params``.

    Adapters follow their kernel: ``lora_a`` [r, in] its input axis, ``lora_b`` [out, r] its output axis;
    what a method adds of its own (`ADDED`, a bank as its live key) has axes here too; ranks, slots, stacked layers and
    keys the decoder does not know have None.
    """
    table = layout(spec) | {"value_head/kernel": Leaf((spec.width, 1), ("embed", None), 0.0)}
    if spec.tied:
        table["head/kernel"] = Leaf((spec.width, spec.vocab), ("embed", "vocab"), None)
    return axes_by(table, params)


def axes_by(table: Mapping[str, Leaf], params: Mapping[str, Any]) -> dict[str, Axes]:
    """The axes of every key of ``params`` by a table of an architecture's own; see `axes`."""
    return {path: _axes(table, path, leaf.ndim) for path, leaf in params.items()}


def _axes(table: Mapping[str, Leaf], path: str, ndim: int) -> Axes:
    site, _, name = plain(path).rpartition("/")
    added = ADDED.get("/".join(plain(path).removesuffix("_bank").split("/")[-2:]))
    leaf, kernel = table.get(f"{site}/{name}"), table.get(f"{site}/kernel")
    if leaf is not None:
        tensor: Axes = leaf.axes
    elif added is not None:
        tensor = added
    elif kernel is not None and name.removesuffix("_old") in ("lora_a", "bank_a", "expert_a", "expert_router"):
        tensor = (None, kernel.axes[0])
    elif kernel is not None and name in ("lora_b", "bank_b", "expert_b"):
        tensor = (kernel.axes[1], None)
    elif kernel is not None and name in ("hat_e", "hat_bank"):  # of the site's input units, as in_scale
        tensor = (kernel.axes[0],)
    elif kernel is not None and name.removesuffix("_bank") in FACTORS:
        tensor = (kernel.axes[name.startswith("out")],)
    else:
        tensor = ()
    return (None,) * (ndim - len(tensor)) + tensor


def plain(path: str) -> str:
    """The path of the first layer behind a stacked key: ``layers/0:30:1/x`` -> ``layers/0/x``."""
    return "/".join(part.partition(":")[0] for part in path.split("/"))
