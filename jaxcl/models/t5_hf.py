"""T5 as Hugging Face has it: config.json to spec and back, and what its files call our parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError, shown
from .t5_spec import T5Spec, layout

Config = Mapping[str, Any]
SIZES = {
    "vocab": ("vocab_size", 32128),
    "width": ("d_model", 512),
    "head_dim": ("d_kv", 64),
    "mlp": ("d_ff", 2048),
    "layers": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "buckets": ("relative_attention_num_buckets", 32),
    "distance": ("relative_attention_max_distance", 128),
}
"""{field: (key, T5Config's default)}"""
PROJECTIONS = {"relu": False, "gated-gelu": True}
REFUSED: dict[str, tuple] = {
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "quantization_config": (None,),
    "prefix": (None, ""),
}
"""{key: the values that we build}"""
TOP = {"embed/kernel": "shared.weight", "head/kernel": "lm_head.weight"}
ATTENTION = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
COPIES = (
    *("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),  # the shared table once more
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # of old files, which nothing reads
)
"""Tensors of a file that are no parameters of their own."""


def t5_spec(config: Config, where: str | Path = "config.json") -> T5Spec:
    """The spec of a T5's config.json. Whether the head is the embedding is left to the weights: `own_head`.

    ``tie_word_embeddings`` says whether the head's input is scaled (transformers 4 and 5), as ``scale_decoder_outputs``
    does (5). Raises RequestError with the key, its value and what is accepted, where it asks for what is not built.
    """

    def wrong(name: str, accepted: str) -> RequestError:
        return RequestError(f"{where}: {name} is {shown(config.get(name))}; accepted: {accepted}")

    def whole(name: str, default: Any) -> Any:
        value = config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise wrong(name, "a whole number")
        return value

    for name, built in REFUSED.items():
        if config.get(name) not in built:
            raise wrong(name, " or ".join(map(repr, built)))
    sizes = {ours: whole(*theirs) for ours, theirs in SIZES.items()}
    if whole("num_decoder_layers", sizes["layers"]) != sizes["layers"]:
        raise wrong("num_decoder_layers", f"{sizes['layers']}, as many as the encoder has")
    projection = config.get("feed_forward_proj", "relu")
    if projection not in PROJECTIONS:
        raise wrong("feed_forward_proj", " or ".join(map(repr, PROJECTIONS)))
    eps, dropout = config.get("layer_norm_epsilon", 1e-6), config.get("dropout_rate", 0.1)
    for name, value in (("layer_norm_epsilon", eps), ("dropout_rate", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong(name, "a number")
    if not 0 <= dropout < 1:
        raise wrong("dropout_rate", "0 up to below 1")
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    if not isinstance(scaled, bool):
        raise wrong("scale_decoder_outputs", "True or False")
    end = whole("eos_token_id", 1)
    start = whole("decoder_start_token_id", config.get("pad_token_id") or 0)
    return T5Spec(
        gated=PROJECTIONS[projection], scaled=scaled, norm_eps=float(eps), dropout=float(dropout), start=start, end=end,
        **sizes,
    )  # fmt: skip


def t5_config(spec: T5Spec) -> dict[str, Any]:
    """config.json of a spec, without dtype; the inverse of `t5_spec`. RequestError where a source has no end mark."""
    if spec.end is None:
        raise RequestError("this T5 puts no end mark behind a source, which no config.json says; accepted: an end")
    names = {value: name for name, value in PROJECTIONS.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{theirs: getattr(spec, ours) for ours, (theirs, _) in SIZES.items()},
        "num_decoder_layers": spec.layers,
        "feed_forward_proj": names[spec.gated],
        "layer_norm_epsilon": spec.norm_eps,
        "dropout_rate": spec.dropout,
        "tie_word_embeddings": spec.scaled,  # which transformers takes for the scaling; the weights say what is tied
        "scale_decoder_outputs": spec.scaled,
        "decoder_start_token_id": spec.start,
        "eos_token_id": spec.end,
        "pad_token_id": spec.start,
    }


def foreign_name(spec: T5Spec, path: str) -> str:
    """``decoder/layers/3/cross/attn/q/kernel`` -> ``decoder.block.3.layer.1.EncDecAttention.q.weight``."""
    if path in TOP:
        return TOP[path]
    side, _, rest = path.partition("/")
    if rest == "relative/table":
        return f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if rest == "final_norm/scale":
        return f"{side}.final_layer_norm.weight"
    _, number, inner = rest.split("/", 2)
    last = len(ATTENTION[side])
    site = inner.rpartition("/")[0]
    if site.startswith("mlp"):
        name = {"mlp/gate": "wi_0", "mlp/up": "wi_1" if spec.gated else "wi", "mlp/down": "wo"}.get(site)
        return f"{side}.block.{number}.layer.{last}." + (f"DenseReluDense.{name}" if name else "layer_norm") + ".weight"
    crossed = site.startswith("cross/")
    kind = ATTENTION[side][crossed]
    name = site.removeprefix("cross/").removeprefix("attn").lstrip("/")
    end = "layer_norm" if name == "_norm" else f"{kind}.{name}"
    return f"{side}.block.{number}.layer.{int(crossed)}.{end}.weight"


def own_head(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file's head is another matrix than its embedding, which is what decides in transformers too."""
    head, shared = (tensors.get(name) for name in ("lm_head.weight", "shared.weight"))
    return head is not None and not (shared is not None and np.array_equal(head, shared))


def parameters(spec: T5Spec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file that are parameters: without copies of the embedding."""
    out = {name: value for name, value in tensors.items() if name not in COPIES}
    if spec.tied:
        out.pop("lm_head.weight", None)
    if "shared.weight" not in out and "encoder.embed_tokens.weight" in tensors:
        out["shared.weight"] = tensors["encoder.embed_tokens.weight"]
    return out


def names_of(spec: T5Spec) -> dict[str, str]:
    """{our path: name in a file} of all parameters."""
    return {path: foreign_name(spec, path) for path in layout(spec)}
