"""What other formats call our parameters, and the check that a file holds exactly a spec's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..errors import RequestError, clipped, nearest
from .layout import Leaf, layout
from .spec import DecoderSpec

Format = Literal["gguf", "hf"]

TOP = {
    "embed/kernel": ("token_embd.weight", "model.embed_tokens.weight"),
    "final_norm/scale": ("output_norm.weight", "model.norm.weight"),
    "head/kernel": ("output.weight", "lm_head.weight"),
}
LAYER = {
    "attn_norm": ("attn_norm", "input_layernorm"),
    "attn_post_norm": ("post_attention_norm", "post_attention_layernorm"),
    "attn/q": ("attn_q", "self_attn.q_proj"),
    "attn/k": ("attn_k", "self_attn.k_proj"),
    "attn/v": ("attn_v", "self_attn.v_proj"),
    "attn/o": ("attn_output", "self_attn.o_proj"),
    "attn/q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "attn/k_norm": ("attn_k_norm", "self_attn.k_norm"),
    "mlp_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "mlp_post_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
    "mlp/gate": ("ffn_gate", "mlp.gate_proj"),
    "mlp/up": ("ffn_up", "mlp.up_proj"),
    "mlp/down": ("ffn_down", "mlp.down_proj"),
}


def foreign_name(spec: DecoderSpec, path: str, style: Format) -> str:
    """``layers/7/attn/q/kernel`` -> ``blk.7.attn_q.weight`` or ``model.layers.7.self_attn.q_proj.weight``."""
    column = ("gguf", "hf").index(style)
    if path in TOP:
        return TOP[path][column]
    _, layer, rest = path.split("/", 2)
    site, _, leaf = rest.rpartition("/")
    theirs = LAYER[site][column]
    if style == "hf" and site == "mlp_norm" and spec.norms == "pre":
        theirs = "post_attention_layernorm"  # Llama named the MLP's norm after what stands before it
    return f"{('blk', 'model.layers')[column]}.{layer}.{theirs}.{'bias' if leaf == 'bias' else 'weight'}"


def is_flipped(path: str) -> bool:
    """Whether other formats store this kernel as [out, in]: all but the embedding."""
    return path.endswith("/kernel") and path != "embed/kernel"


def match(spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]], style: Format, where: str) -> dict[str, str]:
    """{our path: name in the file} for a file's {name: shape}, where shapes are the file's own, [out, in].

    Raises RequestError naming the first tensor that is missing, the first that is unexpected, and the first
    whose shape is another than the spec's.
    """
    if spec.layers > len(shapes):  # before a table of them is made
        raise RequestError(f"{where}: {len(shapes)} tensors cannot be {spec.layers} layers, as its config says")
    leaves = layout(spec)
    return matched(leaves, {path: foreign_name(spec, path, style) for path in leaves}, shapes, where)


def matched(
    leaves: Mapping[str, Leaf], table: dict[str, str], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, str]:
    """``table``, {our path: name in the file}, where a file's {name: shape} are exactly its tensors; see `match`."""
    missing = [path for path, name in table.items() if name not in shapes]
    known = set(table.values())
    unexpected = [name for name in shapes if name not in known]
    if missing or unexpected:
        raise RequestError(
            f"{where}: weights of another architecture; "
            + "; ".join(
                [f"missing {table[p]!r} {list(_shape(leaves, p))}" for p in missing[:1]]
                + [f"unexpected {clipped(n)!r} {list(shapes[n])} ({nearest(n, known)})" for n in unexpected[:1]]
            )
        )
    for path, name in table.items():
        want = _shape(leaves, path)
        if tuple(shapes[name]) != want:
            raise RequestError(f"{where}: {name!r} has shape {list(shapes[name])}; accepted: {list(want)}")
    return table


def _shape(leaves: Mapping[str, Leaf], path: str) -> tuple[int, ...]:
    shape = leaves[path].shape
    return shape[::-1] if is_flipped(path) else shape
