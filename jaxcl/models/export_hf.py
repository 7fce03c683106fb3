"""A decoder as a Hugging Face directory: config.json, safetensors (in shards above a size), tokenizer files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.errors import RequestError
from jaxcl.models.export_config import hf_config
from jaxcl.models.export_tokenizer import write_json, write_tokenizer
from jaxcl.models.hf_config import norm_offset
from jaxcl.models.layout import layout
from jaxcl.models.names import foreign_name, is_flipped
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.stacking import restack
from jaxcl.surgery.adapters import merge

SHARD_BYTES = 5 * 10**9
"""Largest weight file; above it the model is split, as transformers does it."""
LORA = ("lora_a", "lora_b", "lora_scale", "bank_a", "bank_b", "bank_scale")
SCALES = ("in_scale", "out_scale")


def write_hf(
    folder: Path, spec: DecoderSpec, params: Mapping[str, Any], tokenizer: Any, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes a model that transformers' AutoModelForCausalLM and AutoTokenizer load from ``folder`` (which exists).

    params: the flat dict in any stacking, adapters included; they are merged into the kernels. Returns notes.
    Raises RequestError on parameters or a tokenizer that have no such form.
    """
    config = hf_config(spec)
    weights, notes = merged(spec, params)
    ids, more = write_tokenizer(folder, tokenizer, spec.context)
    shards = list(split(spec, weights, shard_bytes))
    write_json(folder / "config.json", {**config, "dtype": str(weights["embed/kernel"].dtype), **ids})
    write_json(folder / "generation_config.json", ids)
    write_shards(folder, spec, weights, shards, norm_offset(config))
    return notes + more


def merged(spec: DecoderSpec, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """(exactly the decoder's own weights, single layers; notes). With adapters, all are float32 and merged.

    Raises RequestError where a part of the model would be lost; parameters the decoder itself never reads (a value
    head) are left out and noted.
    """
    flat = restack({k: np.asarray(v) for k, v in params.items()}, spec, spec.unstacked)[0]
    table = layout(spec)
    extra = [k for k in flat if k not in table]
    if any(k.endswith((*LORA, *SCALES)) for k in extra):
        flat = {k: v.astype(np.float32) for k, v in flat.items()}
        with jax.default_matmul_precision("float32"):  # accelerators multiply in fewer bits unless told
            flat = merge(flat, sorted({k.rpartition("/")[0] for k in extra if k.endswith(LORA)}))
        flat = scaled({k: np.asarray(v) for k, v in flat.items()})
    apart = sorted(k for k in flat if k not in table)
    lost = [k for k in apart if k.split("/")[0] in {path.split("/")[0] for path in table}]
    if lost:
        raise RequestError(f"the run has {lost[0]!r}, which no Hugging Face model of this kind holds")
    notes = [f"left out: {len(apart)} weights that the decoder does not read ({apart[0]}, ...)"] if apart else []
    return {path: flat[path] for path in table}, notes


def scaled(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Factors on a site's inputs and outputs, in_scale [in] and out_scale [out], multiplied into kernel and bias."""
    out = dict(params)
    for key in [k for k in params if k.endswith(SCALES)]:
        site, _, name = key.rpartition("/")
        factor = out.pop(key)
        out[site + "/kernel"] = out[site + "/kernel"] * (factor[:, None] if name == "in_scale" else factor)
        if name == "out_scale" and site + "/bias" in out:
            out[site + "/bias"] = out[site + "/bias"] * factor
    return out


def split(spec: DecoderSpec, weights: Mapping[str, np.ndarray], most: int) -> Iterator[list[str]]:
    """Paths in the layout's order, file by file, each file of at most ``most`` bytes (or a single tensor)."""
    paths: list[str] = []
    size = 0
    for path in layout(spec):
        if paths and size + weights[path].nbytes > most:
            yield paths
            paths, size = [], 0
        paths.append(path)
        size += weights[path].nbytes
    yield paths


def write_shards(
    folder: Path, spec: DecoderSpec, weights: Mapping[str, np.ndarray], shards: list[list[str]], offset: float = 0.0
) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors with their index. offset: what norms' scales leave out."""
    place: dict[str, str] = {}
    for i, paths in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {foreign_name(spec, p, "hf"): foreign(p, weights[p], offset) for p in paths}
        write_tensors(folder / name, tensors)
        place |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(weights[p].nbytes for paths in shards for p in paths)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file as transformers and PEFT want it, readable for those who may read any new file here."""
    from safetensors.numpy import save_file

    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)  # the library makes its files private


def foreign(path: str, value: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """A weight as the file has it: kernels [out, in], scales of norms without their offset."""
    if offset and path.endswith("/scale"):
        return value.astype(np.float32) - np.float32(offset)
    return np.ascontiguousarray(value.T if is_flipped(path) else value)
