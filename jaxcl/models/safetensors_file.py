"""A Hugging Face checkpoint of a Llama-type model (config.json and safetensors) as spec and parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from .gguf_file import Weights
from .names import is_flipped, match
from .spec import DecoderSpec

SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "context": "max_position_embeddings",
}
NOT_BUILT = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def read_safetensors(path: Path) -> Weights:
    """Reads a directory with config.json and model.safetensors (or an index of several files), or one
    safetensors file with config.json beside it. Parameters keep the file's type.

    Raises RequestError on a damaged file, a config that asks for what is not built, tensors that do not fit it.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    spec = read_spec(config, folder / "config.json")
    found: dict[str, np.ndarray] = {}
    for file in _files(path):
        found |= _tensors(file)
    if spec.tied:
        found.pop("lm_head.weight", None)  # some writers store the tied head once more
    table = match(spec, {name: value.shape for name, value in found.items()}, "hf", str(path))
    params = {ours: found[name].T if is_flipped(ours) else found[name] for ours, name in table.items()}
    return Weights(spec, {k: np.ascontiguousarray(v) for k, v in params.items()}, config, False)


def read_spec(config: dict[str, Any], where: Path) -> DecoderSpec:
    """The spec of a config.json of model type llama, in the form of transformers 4 or 5."""
    if config.get("model_type") != "llama":
        raise RequestError(f"{where}: model_type is {config.get('model_type')!r}; accepted: 'llama'")
    for name, built in NOT_BUILT.items():
        if config.get(name, built) != built:
            raise RequestError(f"{where}: {name} is {config[name]!r}; accepted: {built!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise RequestError(f"{where}: the rotary parameters are {rope!r}; accepted: a JSON object")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise RequestError(f"{where}: the rotary scaling is {scaling!r}; accepted: 'default'")

    def number(name: str, kind: type, default: Any = None) -> Any:
        value = {**config, **rope}.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise RequestError(f"{where}: {name} is {value!r}; accepted: {kind.__name__}")
        return kind(value)

    sizes = {ours: number(theirs, int) for ours, theirs in SIZES.items()}
    return DecoderSpec(
        kv_heads=config.get("num_key_value_heads") or sizes["heads"],
        head_dim=config.get("head_dim") or sizes["width"] // max(sizes["heads"], 1),
        rope_theta=number("rope_theta", float, 10000.0),
        norm_eps=number("rms_norm_eps", float, 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        **sizes,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RequestError with file and line where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; accepted: a Hugging Face model with config.json") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: a {type(value).__name__}; accepted: a JSON object")
    return value


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise RequestError(f"{index}: weight_map does not map tensors to files of this folder")
    return [path / name for name in sorted(set(names.values()))]


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of one file; the library checks header, types, offsets and sizes against the file."""
    import ml_dtypes  # noqa: F401  gives numpy the type bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RequestError(f"{file}: no such file; accepted: a safetensors file") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RequestError(f"{file}: damaged safetensors file: {error}") from None
