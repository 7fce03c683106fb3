"""Small T5s under Hugging Face's names, rows for them, a T5 in numpy and a Unigram: what the tests of T5 share."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.t5 import apply, head, init
from jaxcl.models.t5_positions import bucket_of
from jaxcl.models.t5_spec import T5Spec

VOCAB, BUCKETS, DISTANCE = 60, 8, 20
SIZES = {"vocab": VOCAB, "width": 24, "layers": 2, "heads": 3, "head_dim": 8, "mlp": 40}
SPECS = {
    "v1.0": T5Spec(**SIZES, buckets=BUCKETS, distance=DISTANCE),
    "v1.1": T5Spec(**SIZES, buckets=BUCKETS, distance=DISTANCE, gated=True, tied=False),
}
SOURCES, TARGETS, WINDOW, MOST = (17, 9, 30), (6, 3, 5), 40, 6
STACK = ((("block",), 2),)

whole = jax.jit(apply, static_argnums=0)
drawn = jax.jit(init, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits(spec: T5Spec, params: dict, hidden: Any, at: Any) -> jax.Array:
    return head(spec, params, hidden, at)


def texts(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(source, target) ids of three rows."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, VOCAB, a).tolist(), rng.integers(2, VOCAB, b).tolist()) for a, b in zip(SOURCES, TARGETS)]


def batch(rows: list[tuple[list[int], list[int]]], window: int = WINDOW, k: int = MOST) -> dict[str, np.ndarray]:
    """The rows as `jaxcl.data.encode.encode` writes them."""
    shape = (len(rows), window)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    at = np.zeros((len(rows), k), np.int32)
    for i, (source, target) in enumerate(rows):
        n = len(source) + len(target)
        tokens[i, :n], segments[i, :n] = [*source, *target], 1
        at[i, : len(target)] = np.arange(len(source), n)
    positions = np.tile(np.arange(window, dtype=np.int32), (len(rows), 1)) * segments
    return {"tokens": tokens, "segments": segments, "positions": positions, "targets_at": at}


def prompts(rows: list[tuple[list[int], list[int]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources i32[B,width], their lengths)."""
    out = np.zeros((len(rows), width), np.int32)
    for line, (source, _) in zip(out, rows):
        line[: len(source)] = source
    return out, np.array([len(s) for s, _ in rows], np.int32)


def reference(spec: T5Spec, p: dict[str, np.ndarray], source: list[int], given: list[int]) -> np.ndarray:
    """Logits [K,V] of one row in numpy, float64, loops over heads: Raffel et al. 2020 with v1.1's feed-forward. Where
    there are some: prefixes (Li and Liang 2021) and bottlenecks (Houlsby et al. 2019, He et al. 2022)."""

    def norm(x, path):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * p[path + "/scale"]

    def attention(x, other, path, bias, mask):
        q, k, v = (side @ p[f"{path}/{n}/kernel"] for side, n in ((x, "q"), (other, "k"), (other, "v")))
        more = len(p.get(f"{path}/prefix_k", ()))
        if more:
            k, v = (np.concatenate([p[f"{path}/prefix_{n}"], y]) for n, y in (("k", k), ("v", v)))
            bias = np.pad(bias, ((0, 0), (0, 0), (more, 0)))
            mask = np.concatenate([np.ones((len(x), more), bool), np.broadcast_to(mask, (len(x), len(other)))], axis=1)
        outs = []
        for h in range(spec.heads):
            cut = slice(h * spec.head_dim, (h + 1) * spec.head_dim)
            scores = np.where(mask, q[:, cut] @ k[:, cut].T + bias[h], -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outs.append(weights / weights.sum(-1, keepdims=True) @ v[:, cut])
        return np.concatenate(outs, -1) @ p[f"{path}/o/kernel"]

    def biases(side, n, both):
        place = np.arange(n)
        relative = jnp.asarray(place[None] - place[:, None])
        bucket = bucket_of(relative, both=both, buckets=spec.buckets, distance=spec.distance)
        return p[f"{side}/relative/table"][np.asarray(bucket)].transpose(2, 0, 1)

    def feed(x, path):
        gate = x @ p[path + "/gate/kernel"]
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * (x @ p[path + "/up/kernel"])) @ p[path + "/down/kernel"]

    def beside(x, path):
        d, b, u, c = (p[f"{path}_{n}"] for n in ("down", "down_bias", "up", "up_bias"))
        return np.maximum(x @ d + b, 0) @ u + c

    def adapted(x, y, path):
        if f"{path}/parallel_down" in p:
            y = y + p[f"{path}/parallel_scale"] * beside(x, f"{path}/parallel")
        return y + beside(y, f"{path}/adapter") if f"{path}/adapter_down" in p else y

    def stack(side, tokens, memory):
        x, n = p["embed/kernel"][tokens], len(tokens)
        bias, mask = biases(side, n, memory is None), np.ones((n, n), bool) if memory is None else np.tri(n, dtype=bool)
        for i in range(spec.layers):
            at = f"{side}/layers/{i}"
            y = norm(x, at + "/attn_norm")
            x = x + adapted(y, attention(y, y, at + "/attn", bias, mask), at + "/attn")
            if memory is not None:
                free = np.zeros((spec.heads, n, len(memory)))
                x = x + attention(norm(x, at + "/cross/attn_norm"), memory, at + "/cross/attn", free, True)
            y = norm(x, at + "/mlp_norm")
            x = x + adapted(y, feed(y, at + "/mlp"), at + "/mlp")
        return norm(x, f"{side}/final_norm")

    return stack("decoder", given, stack("encoder", source, None)) @ p["head/kernel"]


def unigram() -> Any:
    """A `tokenizers` Unigram in the form of T5's tokenizer.json: pad, eos, unk first, sentinels last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.Unigram())
    space = {"replacement": "\u2581", "prepend_scheme": "always"}
    words = pre_tokenizers.Metaspace(**space)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(**space)
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=45, special_tokens=special, unk_token="<unk>", show_progress=False)
    sentences = ["the cat sat on the mat", "a dog and a cat; the hat", "answer: yes or no?"]
    backend.train_from_iterator(sentences * 20, trainer)
    sentinels = [AddedToken(f"<extra_id_{i}>", normalized=False, special=True) for i in reversed(range(10))]
    backend.add_special_tokens(sentinels)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def write_base(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, a Unigram's tokenizer.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    unigram().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return folder
