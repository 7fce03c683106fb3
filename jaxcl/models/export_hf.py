"""A model as a Hugging Face directory: config.json, safetensors (in shards above a size), tokenizer files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.errors import RequestError
from jaxcl.models.export_config import hf_config
from jaxcl.models.export_tokenizer import write_json, write_tokenizer
from jaxcl.models.hf_config import norm_offset
from jaxcl.models.layout import Leaf, layout
from jaxcl.models.names import foreign_name, is_flipped
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.stacking import restack
from jaxcl.models.t5_hf import names_of, t5_config
from jaxcl.models.t5_spec import T5Spec
from jaxcl.models.t5_spec import layout as t5_layout
from jaxcl.surgery.adapters import merge
from jaxcl.surgery.scales import factors, folded

Spec = DecoderSpec | T5Spec
SHARD_BYTES = 5 * 10**9
"""Largest weight file; above it the model is split, as transformers does it."""
TOKENS = 512
"""What a tokenizer's files say of the longest text where the model itself has no limit (T5's relative positions)."""
LORA = ("lora_a", "lora_b", "lora_scale", "bank_a", "bank_b", "bank_scale")


class Form(NamedTuple):
    """An architecture as files have it: its table of parameters, their names there, config.json without dtype, whether
    token ids that a tokenizer does not have are written as null there (see `write_tokenizer`)."""

    leaves: dict[str, Leaf]
    names: dict[str, str]
    config: Callable[[], dict[str, Any]]
    nulls: bool


def form_of(spec: Spec) -> Form:
    """The form of a decoder or a T5."""
    if isinstance(spec, T5Spec):
        return Form(t5_layout(spec), names_of(spec), lambda: t5_config(spec), False)
    leaves = layout(spec)
    return Form(leaves, {path: foreign_name(spec, path, "hf") for path in leaves}, lambda: hf_config(spec), True)


def write_hf(
    folder: Path, spec: Spec, params: Mapping[str, Any], tokenizer: Any, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes a model that transformers' AutoModelForCausalLM (of a T5: AutoModelForSeq2SeqLM) and AutoTokenizer load
    from ``folder``, which exists.

    params: the flat dict in any stacking, adapters included; they are merged into the kernels. Returns notes.
    Raises RequestError on parameters or a tokenizer that have no such form.
    """
    form = form_of(spec)
    config = form.config()
    weights, notes = merged(spec, params)
    ids, more = write_tokenizer(folder, tokenizer, getattr(spec, "context", TOKENS))
    if not form.nulls:
        given = {name: config[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
        ids = {**given, **{name: value for name, value in ids.items() if value is not None}}
    shards = list(split(spec, weights, shard_bytes))
    write_json(folder / "config.json", {**config, "dtype": str(weights["embed/kernel"].dtype), **ids})
    write_json(folder / "generation_config.json", ids)
    write_shards(folder, spec, weights, shards, norm_offset(config))
    return notes + more


def merged(spec: Spec, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """(exactly the model's own weights, single layers; notes). With adapters, all are float32 and merged.

    Raises RequestError where a part of the model would be lost; parameters the model itself never reads (a value head)
    are left out and noted.
    """
    flat = restack({k: np.asarray(v) for k, v in params.items()}, spec, spec.unstacked)[0]
    table = form_of(spec).leaves
    extra = [k for k in flat if k not in table]
    scales = factors(extra)
    if scales or any(k.endswith(LORA) for k in extra):
        flat = {k: v.astype(np.float32) for k, v in flat.items()}
        with jax.default_matmul_precision("float32"):  # accelerators multiply in fewer bits unless told
            flat = merge(flat, sorted({k.rpartition("/")[0] for k in extra if k.endswith(LORA)}))
        flat = folded({k: np.asarray(v) for k, v in flat.items()}, scales)
    apart = sorted(k for k in flat if k not in table)
    read = {"prompt", *(path.split("/")[0] for path in table)}
    lost = [k for k in apart if k.split("/")[0] in read]
    if lost:
        raise RequestError(f"the run has {lost[0]!r}, which no Hugging Face model of this kind holds")
    notes = [f"left out: {len(apart)} weights that the model does not read ({apart[0]}, ...)"] if apart else []
    return {path: flat[path] for path in table}, notes


def split(spec: Spec, weights: Mapping[str, np.ndarray], most: int) -> Iterator[list[str]]:
    """Paths in the layout's order, file by file, each file of at most ``most`` bytes (or a single tensor)."""
    paths: list[str] = []
    size = 0
    for path in form_of(spec).leaves:
        if paths and size + weights[path].nbytes > most:
            yield paths
            paths, size = [], 0
        paths.append(path)
        size += weights[path].nbytes
    yield paths


def write_shards(
    folder: Path, spec: Spec, weights: Mapping[str, np.ndarray], shards: list[list[str]], offset: float = 0.0
) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors with their index. offset: what norms' scales leave out."""
    place: dict[str, str] = {}
    names = form_of(spec).names
    for i, paths in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names[p]: foreign(p, weights[p], offset) for p in paths}
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
