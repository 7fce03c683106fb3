"""A small Hugging Face folder with a real tokenizer, and runs that start from it: what the tests of export share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import support
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from jaxcl.models import fetch

LAYERS, WIDTH, HEADS, KV, DIM, MLP = 2, 32, 4, 2, 8, 48
TEXTS = (
    "The cat sat on the mat; 12 cats sat there.",
    "Привет, мир! 你好 🙂",
    "def f(x):\n    return x + 1\n",
)
LORA = {"rank": 3, "alpha": 7.0, "dropout": 0.1, "targets": ["attn/q", "mlp/down"]}  # 7/3 is no binary fraction


def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges and one special token, 270 in all."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=269, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, "the cat and the hat"] * 3, trainer)
    backend.add_special_tokens([AddedToken("<end>", normalized=False, special=True)])
    return backend


def weights(vocab: int, tied: bool) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, [out, in]."""
    shapes = {"model.embed_tokens.weight": (vocab, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, WIDTH)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
        rows = {"q": HEADS * DIM, "k": KV * DIM, "v": KV * DIM}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (r, WIDTH) for n, r in rows.items()}
        shapes[f"{at}.self_attn.o_proj.weight"] = (WIDTH, HEADS * DIM)
        shapes |= {f"{at}.mlp.{n}_proj.weight": (MLP, WIDTH) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, MLP)
    rng = np.random.default_rng(3)
    drawn = {name: rng.normal(size=shape) * 0.2 + ("norm" in name) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def write_base(folder: Path, tied: bool = True) -> Path:
    """config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True)
    backend = tokenizer()
    size = backend.get_vocab_size() + 2  # rows to spare, as many models have
    config = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "intermediate_size": MLP,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(size, tied), folder / "model.safetensors", metadata={"format": "pt"})
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": template}))
    return folder


def run(base: Path, methods: list, out: Path, **kw: Any) -> support.Done:
    """Two stages of four steps from the weights of ``base``."""
    model, params, words, info = fetch.load(str(base))
    given = {"spec": model.spec, "params": params, "source": info, "tokenizer": words}
    return support.run(methods, out, **{"n": 2, **given, **kw})
