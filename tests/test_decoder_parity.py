"""Each decoder family beside transformers: small random models through the files that transformers writes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxcl.models.decoder import apply, head
from jaxcl.models.generate import generate
from jaxcl.models.safetensors_file import read_safetensors

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
GEMMA = {
    "num_hidden_layers": 8,
    "head_dim": 10,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
FAMILIES = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12}),
    "linear, all biases": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 10}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, some windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "gemma3": ("Gemma3", GEMMA),
}
TOKENS, NEW = 24, 20


def drawn(kind: str, changes: dict):
    """A random model in which no norm is one and no bias zero."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))(**SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0.0, 0.3)
            if "norm" in name and kind != "Gemma3":
                value.add_(1.0)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers' model, what we read of the folder it saved)."""
    model = drawn(*FAMILIES[request.param])
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, read_safetensors(folder)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, TOKENS)).astype(np.int32)


def block(tokens: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


def test_logits(pair, tokens):
    """Longer than every window, and than the context before Llama 3.1's scaling."""
    theirs, weights = pair
    with torch.no_grad():
        want = theirs(torch.tensor(tokens).long()).logits.numpy()
    batch = block(tokens)

    def logits(params):
        return head(weights.spec, params, apply(weights.spec, params, batch).hidden, batch["positions"])

    got = np.asarray(jax.jit(logits)(weights.params))
    print(f"{theirs.config.model_type}: largest difference of a logit {np.abs(got - want).max():.2e}")
    assert want.std() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_greedy_generation(pair, tokens):
    theirs, weights = pair
    prompts = tokens[:, :9]
    made = theirs.generate(
        torch.tensor(prompts).long(),
        attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    run = jax.jit(functools.partial(generate, apply, head, weights.spec, max_new=NEW, stop_ids=()))
    got, _ = run(weights.params, prompts, np.full(len(prompts), prompts.shape[1], np.int32))
    assert np.array_equal(got, made[:, prompts.shape[1] :].numpy())


def test_gradient_of_the_loss(pair, tokens):
    """Of an embedding, a query kernel and a norm after attention or before it."""
    theirs, weights = pair
    theirs.zero_grad()
    theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    batch = block(tokens)
    grads = jax.jit(jax.grad(lambda p: apply(weights.spec, p, batch).nll[:, 1:].mean()))(weights.params)
    inner = theirs.model
    norm = "attn_norm/scale" if weights.spec.norms != "post" else "attn_post_norm/scale"
    layer = inner.layers[1]
    their_norm = layer.input_layernorm if weights.spec.norms != "post" else layer.post_attention_layernorm
    for ours, want in (
        ("embed/kernel", inner.embed_tokens.weight.grad),
        ("layers/1/attn/q/kernel", layer.self_attn.q_proj.weight.grad.T),
        (f"layers/1/{norm}", their_norm.weight.grad),
    ):
        scale = float(want.abs().max())
        np.testing.assert_allclose(grads[ours] / scale, want.numpy() / scale, atol=2e-4, err_msg=ours)


def test_the_text_model_inside_gemma_3_that_sees(tmp_path, tokens):
    """Its config is nested, its tensors are named otherwise, and those that look at images are left out."""
    torch.manual_seed(0)
    seeing = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SIZES | GEMMA | {"num_hidden_layers": 2, "initializer_range": 0.3},
        vision_config=seeing | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    weights, batch = read_safetensors(tmp_path), block(tokens)
    assert weights.spec.kinds == ("local", "local") and weights.spec.tied
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens).long()).logits.numpy()
    got = head(weights.spec, weights.params, apply(weights.spec, weights.params, batch).hidden, batch["positions"])
    assert want.std() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-4)
