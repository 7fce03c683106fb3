"""A spec becomes the config.json of the model type that computes it, or is refused; what is read back is the same."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import support

from jaxcl.errors import RequestError
from jaxcl.models.decoder import decoder
from jaxcl.models.export_config import hf_config
from jaxcl.models.export_hf import write_hf
from jaxcl.models.safetensors_file import read_safetensors
from jaxcl.models.spec import QKV, SITES, RopeScaling, tiny
from jaxcl.models.stacking import restack

PLAIN = tiny(layers=3, width=16, rope_theta=700.0, context=48)
ATTENTION = tuple(site for site in SITES if site.startswith("attn/"))


def local(*at: int):
    return ((tuple("local" if i in at else "block" for i in range(3)), 1),)


SPECS = {
    "llama": ({}, "llama", {"rope_theta": 700.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False}),
    "llama, untied, biases": (
        {"tied": False, "biases": SITES},
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3.1": (
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "linear": (
        {"rope_scaling": RopeScaling("linear", 3.0)},
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "mistral": ({"segments": local(0, 1, 2), "window": 9}, "mistral", {"sliding_window": 9}),
    "qwen2": ({"biases": QKV}, "qwen2", {"use_sliding_window": False}),
    "qwen2, window": (
        {"biases": QKV, "segments": local(2), "window": 9},
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 9},
    ),
    "qwen3": ({"qk_norm": "head"}, "qwen3", {"attention_bias": False}),
    "qwen3, biases": ({"qk_norm": "head", "biases": ATTENTION}, "qwen3", {"attention_bias": True}),
    "olmo2": ({"norms": "post", "qk_norm": "width"}, "olmo2", {}),
    "gemma3": (
        {
            "norms": "both",
            "qk_norm": "head",
            "activation": "gelu_tanh",
            "embed_scale": 4.0,
            "attn_scale": 24**-0.5,
            "segments": local(0, 1),
            "window": 9,
            "local_theta": 90.0,
            "rope_scaling": RopeScaling("linear", 8.0),
        },
        "gemma3_text",
        {
            "query_pre_attn_scalar": 24,
            "rope_local_base_freq": 90.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_family_is_named_and_read_back_as_it_was(name, tmp_path):
    changes, kind, keys = SPECS[name]
    spec = dataclasses.replace(PLAIN, **changes)
    rng = np.random.default_rng(0)
    shapes = {k: v.shape for k, v in decoder(spec).init(spec, jax.random.key(0)).items()}
    params = {k: rng.uniform(0.5, 2.0, s).astype(np.float32) for k, s in shapes.items()}
    write_hf(tmp_path, spec, params, None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind and config | keys == config
    again = read_safetensors(tmp_path)
    assert support.same(again.params, params)
    training = ("adapter_dropout", "init_std", "nll_chunk", "remat", "dtype", "param_dtype")
    left = {f: getattr(spec, f) for f in training}
    same = dataclasses.replace(again.spec, **left)
    assert same == (spec if spec.attn_scale else dataclasses.replace(spec, attn_scale=same.attn_scale))
    assert same.attn_scale in (None, spec.attn_scale)


def test_how_a_model_was_trained_does_not_matter():
    changes = {"adapter_dropout": 0.1, "remat": "block", "nll_chunk": 7, "dtype": "bfloat16", "init_std": 0.5}
    stacked = restack({}, PLAIN, ((("block",), 3),))[1]
    assert hf_config(dataclasses.replace(stacked, **changes)) == hf_config(PLAIN)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm": "width"}, "qk_norm 'width'"),
        ({"norms": "post"}, "norms 'post'"),
        ({"activation": "gelu_tanh"}, "activation 'gelu_tanh'"),
        ({"embed_scale": 3.0}, "embed_scale 3.0"),
        ({"attn_scale": 0.25}, "attn_scale 0.25"),
        ({"biases": ("attn/q",)}, "biases ('attn/q',)"),
        ({"segments": local(0), "window": 4}, "window 4"),
        ({"biases": QKV, "qk_norm": "head"}, "qk_norm 'head', biases ('attn/q', 'attn/k', 'attn/v')"),
    ],
)
def test_options_that_no_model_type_combines_are_refused(changes, named, tmp_path):
    spec = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(RequestError) as caught:
        write_hf(tmp_path, spec, support.weights(spec), None)
    says = str(caught.value)
    assert "no model type of transformers has" in says and named in says and "accepted: llama, mistral" in says
    assert "\n" not in says and list(tmp_path.iterdir()) == []
