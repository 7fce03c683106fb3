"""A Hugging Face checkpoint (config.json and safetensors) of a Llama-type model or a T5 as spec and parameters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..core.files import read_bytes
from ..errors import RequestError
from .gguf_file import Weights
from .hf_config import norm_offset, spec_from_hf, text_tensors
from .names import is_flipped, match, matched
from .spec import DecoderSpec
from .t5_hf import names_of, own_head, parameters, t5_spec
from .t5_spec import T5Spec
from .t5_spec import layout as t5_layout

MAX_JSON = 64 << 20

def read_safetensors(path: Path) -> Weights:
    """Reads a directory with config.json and model.safetensors (or several shards with their index), or one
    safetensors file with config.json beside it. Parameters keep the file's type.

    Raises RequestError on a damaged file, a config that asks for what is not built, tensors that do not fit it, shards
    that do not hold exactly what their index says.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    reading = t5_spec if config.get("model_type") == "t5" else spec_from_hf
    spec: T5Spec | DecoderSpec = reading(config, folder / "config.json")
    found: dict[str, np.ndarray] = {}
    for file, promised in weight_files(path).items():
        values = _tensors(file)
        if promised is not None:
            _check_shard(file, set(values), promised)
        found |= values
    if isinstance(spec, T5Spec):
        spec = dataclasses.replace(spec, tied=not own_head(found))
        found = parameters(spec, found)
        table = matched(t5_layout(spec), names_of(spec), {k: v.shape for k, v in found.items()}, str(path))
    else:
        found = text_tensors(config, found)
        if spec.tied:
            found.pop("lm_head.weight", None)  # some writers store the tied head once more
        table = match(spec, {name: value.shape for name, value in found.items()}, "hf", str(path))
    params = {ours: found[name].T if is_flipped(ours) else found[name] for ours, name in table.items()}
    if offset := norm_offset(config):
        params |= {k: v.astype(np.float32) + np.float32(offset) for k, v in params.items() if k.endswith("/scale")}
    return Weights(spec, {k: np.ascontiguousarray(v) for k, v in params.items()}, config, False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RequestError with file and line where there is none."""
    try:
        value = json.loads(read_bytes(path, MAX_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; accepted: a Hugging Face model with config.json") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: a {type(value).__name__}; accepted: a JSON object")
    return value


def weight_files(path: Path) -> dict[Path, frozenset[str] | None]:
    """{file: the tensors that the index promises there; None without an index}. One file wins over shards, as in
    transformers. Raises RequestError on an index that is not one, and on the first shard that is not there."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if path.is_file() or whole.exists() or not index.exists():
        return {path if path.is_file() else whole: None}
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise RequestError(f"{index}: weight_map does not map tensors to files of this folder")
    shards: dict[str, set[str]] = {}
    for tensor, name in names.items():
        shards.setdefault(name, set()).add(tensor)
    missing = [name for name in sorted(shards) if not (path / name).is_file()]
    if missing:
        raise RequestError(f"{path / missing[0]}: no such file; accepted: all {len(shards)} shards of {index.name}")
    return {path / name: frozenset(shards[name]) for name in sorted(shards)}


def _check_shard(file: Path, found: set[str], promised: frozenset[str]) -> None:
    """RequestError unless a shard holds what the index says, no less and no more (so nothing comes twice)."""
    if less := sorted(promised - found):
        raise RequestError(f"{file}: {less[0]!r} is not in it, though the index says so ({len(less)} such)")
    if more := sorted(found - promised):
        raise RequestError(f"{file}: holds {more[0]!r}, which the index does not place there ({len(more)} such)")


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
