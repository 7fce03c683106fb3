"""config.json of models as published, as specs; what we do not build is refused by key, value and place."""

from __future__ import annotations

import math

import pytest

from jaxcl.errors import RequestError
from jaxcl.models.hf_config import norm_offset, spec_from_hf
from jaxcl.models.layout import layout
from jaxcl.models.spec import QKV, SITES, RopeScaling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN3 = QWEN2 | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "sliding_window": None,
    "rope_scaling": None,
    "attention_bias": False,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
GEMMA_1B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA, 1_235_814_400),
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
        (MISTRAL, 7_241_732_096),
        (OLMO2, 1_484_916_736),
        (GEMMA_1B, 999_885_952),
        (GEMMA_4B, 3_880_263_168),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_as_many_parameters_as_published(config, published):
    table = layout(spec_from_hf(config))
    assert sum(math.prod(leaf.shape) for leaf in table.values()) == published


def test_llama_3():
    spec = spec_from_hf(LLAMA)
    assert spec.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192) and spec.rope_theta == 5e5
    assert (spec.tied, spec.norm_eps, spec.context, spec.norms, spec.biases) == (True, 1e-5, 131072, "pre", ())
    every = spec_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert every.biases == SITES


def test_qwen():
    assert spec_from_hf(QWEN2).biases == QKV and spec_from_hf(QWEN2).head_dim == 64
    assert spec_from_hf(QWEN2).kinds == ("block",) * 24
    windows = spec_from_hf(QWEN2 | {"use_sliding_window": True, "max_window_layers": 21})
    assert windows.kinds == ("block",) * 21 + ("local",) * 3 and windows.window == 32768
    spec = spec_from_hf(QWEN3)
    assert (spec.qk_norm, spec.head_dim, spec.biases) == ("head", 128, ())


def test_mistral_olmo_and_what_a_file_leaves_out():
    assert set(spec_from_hf(MISTRAL).kinds) == {"local"} and spec_from_hf(MISTRAL).window == 4096
    assert set(spec_from_hf(MISTRAL | {"sliding_window": None}).kinds) == {"block"}
    olmo = spec_from_hf({k: v for k, v in OLMO2.items() if k != "rms_norm_eps"})
    assert (olmo.norms, olmo.qk_norm, olmo.norm_eps) == ("post", "width", 1e-5)


def test_gemma_3():
    spec = spec_from_hf(GEMMA_1B)
    assert spec.kinds == (("local",) * 5 + ("block",)) * 4 + ("local",) * 2
    assert (spec.norms, spec.qk_norm, spec.activation, spec.tied) == ("both", "head", "gelu_tanh", True)
    assert (spec.rope_theta, spec.local_theta, spec.window) == (1e6, 1e4, 512)
    assert spec.embed_scale == 1152**0.5 and spec.attn_scale == 1 / 16 and spec.rope_scaling is None
    large = spec_from_hf(GEMMA_4B)
    assert large.rope_scaling == RopeScaling("linear", 8.0) and (large.heads, large.kv_heads) == (8, 4)
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    new = spec_from_hf(GEMMA_1B | {"rope_parameters": nested, "layer_types": ["sliding_attention"] * 26})
    assert new.rope_scaling == RopeScaling("linear", 8.0) and new.local_theta == 2e4 and set(new.kinds) == {"local"}
    assert [norm_offset(c) for c in (LLAMA, OLMO2, GEMMA_1B, GEMMA_4B)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA | {"model_type": "mamba"}, "model_type is 'mamba'; accepted: 'llama', 'mistral'"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        (LLAMA | {"sliding_window": 512}, "sliding_window is 512"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "x"}}, "factor is 'x'; accepted: float"),
        (LLAMA | {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 16}, "none, for model type 'llama'"),
        (MISTRAL | {"attention_bias": True}, "attention_bias is True"),
        (QWEN2 | {"mlp_bias": True}, "mlp_bias is True"),
        (QWEN3 | {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is False"),
        (QWEN3 | {"layer_types": ["full_attention"]}, "a list of 28 kinds"),
        (QWEN3 | {"layer_types": ["ful_attention"] * 28}, "did you mean 'full_attention'"),
        (GEMMA_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (GEMMA_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_1B | {"hidden_activation": "gelu"}, "accepted: 'gelu_pytorch_tanh'"),
        (GEMMA_1B | {"sliding_window": None}, "sliding_window is None"),
    ],
)
def test_what_is_not_built_is_refused(config, says):
    with pytest.raises(RequestError, match=says) as caught:
        spec_from_hf(config, "here/config.json")
    assert str(caught.value).startswith(("here/config.json: ", "unknown ")) and "\n" not in str(caught.value)
