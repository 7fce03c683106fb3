"""A Hugging Face config.json as a `DecoderSpec`: what its keys mean, and which of them we do not build.

A key that would change the function is either read or refused, never passed over. Where a file leaves a key out,
its model type's default counts, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import RequestError, shown, unknown
from .spec import QKV, SITES, DecoderSpec, RopeScaling

T = TypeVar("T")
Config = Mapping[str, Any]
SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "context": "max_position_embeddings",
}


class Family(NamedTuple):
    """options: fields of the spec that a model type fixes; defaults: of its config.json; bias_key: whether
    ``attention_bias`` means anything to it."""

    options: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    bias_key: bool = True


_GEMMA = {"norms": "both", "qk_norm": "head", "activation": "gelu_tanh"}
_GEMMA_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_THETA = {"gemma3_text": 1e6}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({}, {"sliding_window": 4096, "num_key_value_heads": 8}, bias_key=False),
    "qwen2": Family({"biases": QKV}, {"sliding_window": 4096}, bias_key=False),
    "qwen3": Family({"qk_norm": "head"}, {"sliding_window": 4096, "head_dim": 128}),
    "olmo2": Family({"norms": "post", "qk_norm": "width"}, {"rms_norm_eps": 1e-5}),
    "gemma3_text": Family(_GEMMA, _GEMMA_DEFAULTS),
}
REFUSED: dict[str, tuple] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}
"""{key: the values that we build}"""
LARGEST = 2**63  # of a number
LAYER_TYPES = {"full_attention": "block", "sliding_attention": "local"}


def spec_from_hf(config: Config, where: str | Path = "config.json") -> DecoderSpec:
    """The spec of a config.json in the form of transformers 4 or 5: model types llama, mistral, qwen2, qwen3, olmo2,
    gemma3_text, and of gemma3 the text model. Every layer stands alone (`jaxcl.models.stacking.restack` stacks them).

    Raises RequestError with the key, its value and what is accepted, where it asks for what is not built.
    """
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict):
        config = {"model_type": "gemma3_text", **config["text_config"]}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(map(repr, (*FAMILIES, "gemma3", "t5")))
        raise RequestError(f"{where}: model_type is {shown(kind)}; accepted: {known}")
    return _Reader(kind, config, where).spec()


def norm_offset(config: Config) -> float:
    """What a file of this config leaves out of its norms' scales: Gemma's hold scale - 1."""
    return 1.0 if config.get("model_type") in ("gemma3", "gemma3_text") else 0.0


def text_tensors(config: Config, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of the text model, under the names of one that stands alone: of a gemma3 file, which also holds what
    looks at images, only those of its language model."""
    if config.get("model_type") != "gemma3":
        return dict(tensors)
    out = {}
    for name, value in tensors.items():
        for theirs, ours in (("model.language_model.", "model."), ("language_model.", "")):
            if name.startswith(theirs):
                out[ours + name.removeprefix(theirs)] = value
                break
    return out


class _Reader:
    def __init__(self, kind: str, config: Config, where: str | Path):
        self.kind, self.where, self.family = kind, where, FAMILIES[kind]
        self.config = {**self.family.defaults, **config}

    def wrong(self, name: str, value: Any, accepted: str) -> RequestError:
        return RequestError(f"{self.where}: {name} is {shown(value)}; accepted: {accepted}")

    def number(self, name: str, kind: type[int] | type[float], default: Any = None, table: Config | None = None) -> Any:
        value: Any = (self.config if table is None else table).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or abs(value) >= LARGEST:
            raise self.wrong(name, value, kind.__name__)
        return kind(value)

    def positive(self, name: str, kind: type[int] | type[float]) -> Any:
        value = self.number(name, kind)
        if value <= 0:
            raise self.wrong(name, value, f"{kind.__name__} above 0")
        return value

    def spec(self) -> DecoderSpec:
        self.check()
        sizes = {ours: self.positive(theirs, int) for ours, theirs in SIZES.items()}
        kinds = self.kinds(sizes["layers"])
        options = {**self.family.options, **self.biases(), **self.rotary()}
        if self.kind == "gemma3_text":
            options["embed_scale"] = sizes["width"] ** 0.5
            options["attn_scale"] = self.positive("query_pre_attn_scalar", float) ** -0.5
        if "local" in kinds:
            options["window"] = self.number("sliding_window", int)
        else:
            options.pop("local_theta", None)
        return DecoderSpec(
            kv_heads=self.number("num_key_value_heads", int, sizes["heads"]),
            head_dim=self.number("head_dim", int, sizes["width"] // sizes["heads"]),
            norm_eps=self.number("rms_norm_eps", float, 1e-6),
            tied=bool(self.config.get("tie_word_embeddings", False)),
            segments=((kinds, 1),) if kinds else (),
            **sizes,
            **options,
        )

    def check(self) -> None:
        """RequestError at the first key that asks for what is not built."""
        act = "gelu_pytorch_tanh" if self.kind == "gemma3_text" else "silu"
        allowed = REFUSED | {"hidden_act": (act, None), "hidden_activation": (act, None)}
        if not self.family.bias_key:
            allowed["attention_bias"] = (False, None)
        if self.kind != "llama":
            allowed["mlp_bias"] = (False, None)
        for name, built in allowed.items():
            if self.config.get(name) not in built:
                raise self.wrong(name, self.config[name], " or ".join(map(repr, built)))

    def biases(self) -> dict[str, tuple[str, ...]]:
        sites = set(self.family.options.get("biases", ()))
        if self.config.get("attention_bias"):
            sites |= {site for site in SITES if site.startswith("attn/")}
        if self.config.get("mlp_bias"):
            sites |= {site for site in SITES if site.startswith("mlp/")}
        return {"biases": tuple(sites)}

    def kinds(self, layers: int) -> tuple[str, ...]:
        """The kind of each layer: as ``layer_types`` says, else by the model type's own rule."""
        rule = self.rule(layers) if layers < 2**16 else ()
        given = self.config.get("layer_types")
        if given is None:
            return rule
        if not isinstance(given, list) or len(given) != layers:
            raise self.wrong("layer_types", given, f"a list of {layers} kinds")
        for kind in given:
            if not isinstance(kind, str) or kind not in LAYER_TYPES:
                raise unknown("kind of layer", shown(kind), LAYER_TYPES, where=f"{self.where}: layer_types")
        kinds = tuple(LAYER_TYPES[kind] for kind in given)
        if kinds != rule and self.kind in ("llama", "mistral", "olmo2"):  # transformers does not read it for these
            raise self.wrong("layer_types", given, f"none, for model type {self.kind!r}")
        if "local" in kinds and self.kind in ("qwen2", "qwen3") and not self.config.get("use_sliding_window"):
            raise self.wrong("use_sliding_window", self.config.get("use_sliding_window"), "True with sliding layers")
        return kinds

    def rule(self, layers: int) -> tuple[str, ...]:
        window = self.config.get("sliding_window")
        if self.kind in ("llama", "olmo2"):
            if window is not None:
                raise self.wrong("sliding_window", window, f"None, for model type {self.kind!r}")
            return ("block",) * layers
        if self.kind == "mistral":
            return ("block" if window is None else "local",) * layers
        if self.kind == "gemma3_text":
            every = max(self.number("sliding_window_pattern", int, 6), 1)
            return tuple("local" if (i + 1) % every else "block" for i in range(layers))
        used = self.config.get("use_sliding_window") and window is not None
        first = self.number("max_window_layers", int, 28) if used else layers
        return tuple("local" if i >= first else "block" for i in range(layers))

    def rotary(self) -> dict[str, Any]:
        """rope_theta, rope_scaling and local_theta, from ``rope_parameters`` (transformers 5) or the older keys."""
        name = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        table = self.config.get(name) or {}
        if not isinstance(table, dict):
            raise self.wrong(name, table, "a JSON object")
        if self.kind != "gemma3_text":
            theta, scaling = self.one(name, table)
            return {"rope_theta": theta, "rope_scaling": scaling}
        nested = any(kind in table for kind in LAYER_TYPES)
        whole, local = (table.get(kind) or {} for kind in LAYER_TYPES) if nested else (table, {})
        if not isinstance(whole, dict) or not isinstance(local, dict):
            raise self.wrong(name, table, "a JSON object for each kind of layer")
        theta, scaling = self.one(name, whole)
        own = self.number("rope_local_base_freq", float, 10000.0)
        local_theta, stretched = self.one(name, {"rope_theta": own, **local})
        if stretched is not None:
            raise self.wrong(name, local, "'default' for sliding layers")
        return {"rope_theta": theta, "rope_scaling": scaling, "local_theta": local_theta}

    def one(self, name: str, table: Config) -> tuple[float, RopeScaling | None]:
        """(theta, scaling) of one table of rotary parameters."""
        theta = self.number("rope_theta", float, self.config.get("rope_theta") or _THETA.get(self.kind, 1e4), table)
        kind = table.get("rope_type", table.get("type", "default"))
        if table.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.wrong(f"{name}: partial_rotary_factor", table["partial_rotary_factor"], "1.0")
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", self.number("factor", float, None, table))
        if kind != "llama3":
            raise self.wrong(f"{name}: rope_type", kind, "'default', 'linear', 'llama3'")
        low, high = (self.number(f"{end}_freq_factor", float, None, table) for end in ("low", "high"))
        original = self.number(
            "original_max_position_embeddings", int, self.config.get("max_position_embeddings"), table
        )
        return theta, RopeScaling("llama3", self.number("factor", float, None, table), low, high, original)
