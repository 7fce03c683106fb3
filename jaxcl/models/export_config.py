"""A spec as the config.json of a model type that transformers knows: the inverse of `jaxcl.models.hf_config`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxcl.errors import RequestError
from jaxcl.models.hf_config import FAMILIES, LAYER_TYPES, SIZES, spec_from_hf
from jaxcl.models.spec import DecoderSpec

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
HOW = ("dtype", "param_dtype", "adapter_dropout", "remat", "nll_chunk", "init_std", "segments")
"""Fields of a spec that say how the function is computed or trained, not which function it is."""


def hf_config(spec: DecoderSpec) -> dict[str, Any]:
    """config.json, without dtype and token ids, of the first model type that computes the same function.

    Every candidate is read back by `spec_from_hf` before it is taken. Raises RequestError where no model type of
    transformers combines the spec's options.
    """
    for kind in FAMILIES:
        config = _candidate(spec, kind)
        try:
            again = spec_from_hf(config)
        except RequestError:
            continue
        if function(again) == function(spec):
            return config
    options = ", ".join(f"{k} {v!r}" for k, v in function(spec).items() if v != function(_plain(spec))[k])
    raise RequestError(f"no model type of transformers has {options} together; accepted: {', '.join(FAMILIES)}")


def function(spec: DecoderSpec) -> dict[str, Any]:
    """What a spec computes: its fields without `HOW`, defaults written out."""
    out = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in HOW}
    out["kinds"] = spec.kinds
    if spec.attn_scale is None:
        out["attn_scale"] = spec.head_dim**-0.5
    if spec.window is not None and spec.local_theta is None and spec.rope_scaling is None:
        out["local_theta"] = spec.rope_theta
    return out


def _plain(spec: DecoderSpec) -> DecoderSpec:
    """Llama of the same sizes."""
    names = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "context")
    same = ("rope_theta", "norm_eps", "tied")
    return DecoderSpec(**{name: getattr(spec, name) for name in names + same})


def _candidate(spec: DecoderSpec, kind: str) -> dict[str, Any]:
    """The spec in the words of a model type, right or not; rotary keys in the form that transformers 4 and 5 read."""
    config: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind}
    config |= {theirs: getattr(spec, ours) for ours, theirs in SIZES.items()}
    config |= {
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "rope_theta": spec.rope_theta,
        "rope_scaling": _scaling(spec),
        "attention_bias": kind != "qwen2" and any(site.startswith("attn/") for site in spec.biases),
    }
    if kind == "llama":
        config["mlp_bias"] = any(site.startswith("mlp/") for site in spec.biases)
    if kind in ("mistral", "qwen2", "qwen3", "gemma3_text"):
        config["sliding_window"] = spec.window
    if kind in ("qwen2", "qwen3"):
        config["use_sliding_window"] = spec.window is not None
        config["max_window_layers"] = spec.kinds.index("local") if spec.window is not None else spec.layers
    if kind in ("qwen2", "qwen3", "gemma3_text"):
        names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        config["layer_types"] = [names[k] for k in spec.kinds]
    if kind == "gemma3_text":
        scale = (spec.attn_scale or spec.head_dim**-0.5) ** -2
        config["query_pre_attn_scalar"] = round(scale) if abs(scale - round(scale)) < 1e-6 else scale
        config["rope_local_base_freq"] = spec.local_theta or spec.rope_theta
        config["hidden_activation"] = "gelu_pytorch_tanh"
    else:
        config["hidden_act"] = "silu"
    return config


def _scaling(spec: DecoderSpec) -> dict[str, Any] | None:
    if spec.rope_scaling is None:
        return None
    kind, factor, low, high, original = spec.rope_scaling
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    ends = {"low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": kind, "factor": factor, **ends, "original_max_position_embeddings": original}
