"""What a GGUF header says about a model, as a `DecoderSpec`.

The keys are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); where it fixes something in its
code instead of the file (Gemma's pattern of layers, how queries are scaled), the same is fixed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError, shown
from .gguf_header import Header
from .names import LAYER
from .spec import QKV, SITES, DecoderSpec, RopeScaling

SIZES = {
    "layers": "block_count",
    "width": "embedding_length",
    "heads": "attention.head_count",
    "mlp": "feed_forward_length",
    "context": "context_length",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"biases": QKV},
    "qwen3": {"qk_norm": "head"},
    "gemma3": {"norms": "both", "qk_norm": "head", "activation": "gelu_tanh"},
    "olmo2": {"norms": "post", "qk_norm": "width"},
}
"""{general.architecture: the fields of the spec that it fixes}"""
REFUSED: dict[str, tuple] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.causal": (True,),
    "rope.scale_linear": (1,),
}
"""{key: the values that we build}"""
ROPE_FACTORS = "rope_freqs.weight"
GEMMA_27B = 62  # layers; llama.cpp knows this model by them, too


def read_spec(header: Header, path: Path, factors: np.ndarray | None = None) -> DecoderSpec:
    """The spec that a GGUF header describes. factors: f32[head_dim/2], the file's tensor ``rope_freqs.weight``.

    Raises RequestError where a key is absent or asks for what is not built.
    """
    return _Reader(header, path).spec(factors)


class _Reader:
    def __init__(self, header: Header, path: Path):
        self.fields, self.tensors, self.path = header.fields, header.tensors, path
        arch = self.fields.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise RequestError(f"{path}: architecture {shown(arch)}; accepted: {', '.join(map(repr, ARCHITECTURES))}")
        self.arch = arch

    def wrong(self, name: str, value: Any, accepted: str) -> RequestError:
        return RequestError(f"{self.path}: key '{self.arch}.{name}' is {shown(value)}; accepted: {accepted}")

    def number(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.fields.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise self.wrong(name, value, kind.__name__)
        return kind(value)

    def size(self, name: str, default: int | None = None) -> int:
        value = self.number(name, int, default)
        if value < 1:
            raise self.wrong(name, value, "above 0")
        return value

    def spec(self, factors: np.ndarray | None) -> DecoderSpec:
        for name, built in REFUSED.items():
            value = self.fields.get(f"{self.arch}.{name}", built[0])
            if value not in built:
                raise self.wrong(name, value, " or ".join(map(repr, built)))
        sizes: dict[str, Any] = {ours: self.size(key) for ours, key in SIZES.items()}
        embed = self.tensors.get("token_embd.weight")
        if embed is None:
            raise RequestError(f"{self.path}: missing 'token_embd.weight'; accepted: a Llama-type model")
        head_dim = self.size("attention.key_length", sizes["width"] // sizes["heads"])
        for name in ("rope.dimension_count", "attention.value_length"):
            if self.number(name, int, head_dim) != head_dim:
                raise self.wrong(name, self.number(name, int), f"{head_dim}, the head size")
        theta = self.number("rope.freq_base", float, 10000.0)
        return DecoderSpec(
            vocab=embed.shape[0],
            kv_heads=self.number("attention.head_count_kv", int, sizes["heads"]),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=self.scaling() if factors is None else self.stretched(factors, head_dim, theta),
            norm_eps=_short(self.number("attention.layer_norm_rms_epsilon", float)),
            tied="output.weight" not in self.tensors,
            **sizes,
            **(ARCHITECTURES[self.arch] | self.biases() | self.gemma(sizes, head_dim)),
        )

    def biases(self) -> dict[str, Any]:
        there = {site for site in SITES if f"blk.0.{LAYER[site][0]}.bias" in self.tensors}
        return {"biases": tuple(there | set(ARCHITECTURES[self.arch].get("biases", ())))}

    def gemma(self, sizes: dict[str, int], head_dim: int) -> dict[str, Any]:
        """Scales and local layers of Gemma 3; of the others only that they have none."""
        window = self.number("attention.sliding_window", int, 0)
        if self.arch != "gemma3":
            if window:
                raise self.wrong("attention.sliding_window", window, "0")
            return {}
        queries = max(sizes["width"] // sizes["heads"], 1) if sizes["layers"] == GEMMA_27B else head_dim
        options: dict[str, Any] = {"embed_scale": sizes["width"] ** 0.5, "attn_scale": queries**-0.5}
        kinds = self.kinds(sizes["layers"])
        if "local" in kinds:
            theta = self.number("rope.freq_base_swa", float, 10000.0)
            options |= {"window": window, "local_theta": theta}
        return options | {"segments": ((kinds, 1),) if kinds else ()}

    def kinds(self, layers: int) -> tuple[str, ...]:
        """Every sixth layer sees everything, or as the file says: a period, or one truth value a layer."""
        name = "attention.sliding_window_pattern"
        pattern = self.fields.get(f"{self.arch}.{name}", 6)
        if isinstance(pattern, list):
            if len(pattern) != layers:
                raise self.wrong(name, pattern, f"{layers} values")
            return tuple("local" if is_local else "block" for is_local in pattern)
        every = self.size(name, 6)
        return tuple("local" if (i + 1) % every else "block" for i in range(min(layers, 2**16)))

    def scaling(self) -> RopeScaling | None:
        kind = self.fields.get(f"{self.arch}.rope.scaling.type", "none")
        if kind == "linear":
            return RopeScaling("linear", self.number("rope.scaling.factor", float))
        if kind != "none":
            raise self.wrong("rope.scaling.type", kind, "'none', 'linear'")
        return None

    def stretched(self, factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling | None:
        """Llama 3.1's scaling, of which llama.cpp stores only what each pair's rate is divided by: the largest divisor
        is the factor, the rest is as in all of Meta's models, and must give the file's numbers."""
        from .rope import rates

        if factors.shape != (head_dim // 2,):
            raise RequestError(f"{self.path}: {ROPE_FACTORS!r} has shape {factors.shape}; accepted: ({head_dim // 2},)")
        if (factors == 1).all():
            return None
        original = self.number("rope.scaling.original_context_length", int, 8192)
        found = RopeScaling("llama3", float(factors.max()), original=original)
        want = np.asarray(rates(head_dim, theta) / rates(head_dim, theta, found))
        if not np.allclose(factors, want, rtol=1e-3):
            accepted = f"{want.tolist()}, those of {tuple(found)}"
            raise RequestError(f"{self.path}: {ROPE_FACTORS!r} is {factors.tolist()}; accepted: {accepted}")
        return found


def _short(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
