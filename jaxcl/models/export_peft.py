"""The adapters of a run as a PEFT directory: adapter_config.json and adapter_model.safetensors, for its base model.

A site's live adapter and the filled slots of its bank become one adapter of rank r (S + 1), their rows and columns
side by side: sum_s B_s A_s = [B_1 .. B_S] [A_1; ..; A_S].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.models.export_hf import LORA, TOKENS, Spec, form_of, write_tensors
from jaxcl.models.export_run import weight_at
from jaxcl.models.export_tokenizer import write_json, write_tokenizer
from jaxcl.models.fetch import MODELS, is_hub_id
from jaxcl.models.peft_forms import FORMS, PREFIX, kinds, of_a_form
from jaxcl.models.stacking import restack
from jaxcl.models.t5_spec import T5Spec


class Adapter(NamedTuple):
    """One site: y += scale (x a^T) b^T, a f32[r, in], b f32[out, r]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def write_peft(
    folder: Path,
    spec: Spec,
    params: Mapping[str, Any],
    base: Mapping[str, Any],
    source: Mapping[str, Any],
    tokenizer: Any,
) -> list[str]:
    """Writes the adapters in ``params`` for the base they were trained on; returns notes.

    base: the weights the run was given. source: config.json's record of them, whose ``model`` names the base. Raises
    RequestError where anything but adapters differs from the base, and where there is no adapter.
    """
    refuse_other_changes(params, base)
    flat = restack({k: np.asarray(v) for k, v in params.items()}, spec, spec.unstacked)[0]
    name, revision = base_name(source)
    tensors, config = written(spec, flat)
    shared = {"base_model_name_or_path": name, "revision": revision, "inference_mode": True}
    shared["task_type"] = "SEQ_2_SEQ_LM" if isinstance(spec, T5Spec) else "CAUSAL_LM"
    write_json(folder / "adapter_config.json", {**config, **shared})
    write_tensors(folder / "adapter_model.safetensors", tensors)
    notes = write_tokenizer(folder, tokenizer, getattr(spec, "context", TOKENS))[1]
    if name is None:
        notes.append("the run's base has no name: give PEFT the base model yourself")
    if source.get("dequantised"):
        notes.append(f"trained on de-quantised weights ({source.get('source')}); on others its logits differ")
    return notes


def written(spec: Spec, flat: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, config) of the one kind of adapter there is. RequestError where there is none, or several kinds."""
    names = [*(["LoRA"] if sites(flat) else []), *kinds(flat)]
    if not names:
        raise RequestError("the run has no adapters; accepted: --format hf")
    if len(names) > 1:
        both = " and ".join(names)
        raise RequestError(f"the run has {both}, and a PEFT folder holds one kind; accepted: --format hf")
    if names != ["LoRA"]:
        return FORMS[names[0]][1](spec, flat)
    ours = form_of(spec).names
    adapters = {ours[s + "/kernel"].removesuffix(".weight"): adapter(flat, s) for s in sites(flat)}
    tensors = {}
    for module, one in adapters.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(one.a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(one.b)
    return tensors, adapter_config(spec, adapters)


def refuse_other_changes(params: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """RequestError unless all but the adapters is as it was given, bit for bit."""
    changed, new = [], []
    for path in sorted(k for k in params if not k.endswith(LORA) and not of_a_form(k)):
        was = weight_at(base, path)
        if was is None or was.shape != params[path].shape:
            new.append(path)
        elif not np.array_equal(was.astype(params[path].dtype, copy=False), params[path], equal_nan=True):
            changed.append(path)
    if changed or new:
        what = f"{len(changed)} weights of the base changed" if changed else f"{len(new)} weights are new"
        raise RequestError(
            f"{what} in this run ({(changed or new)[0]!r}, ...), which an adapter cannot hold; accepted: --format hf"
        )


def sites(flat: Mapping[str, Any]) -> list[str]:
    """Sites that have a live adapter or a bank."""
    return sorted({k.rpartition("/")[0] for k in flat if k.endswith(("/lora_a", "/bank_a"))})


def adapter(flat: Mapping[str, np.ndarray], site: str) -> Adapter:
    """A site's adapters as one; empty slots of a bank (A or B all zeros) add nothing and are left out."""
    parts = []
    if f"{site}/lora_a" in flat:
        parts.append(Adapter(flat[f"{site}/lora_a"], flat[f"{site}/lora_b"], float(flat[f"{site}/lora_scale"])))
    if f"{site}/bank_a" in flat:
        scale = float(flat[f"{site}/bank_scale"])
        slots = zip(flat[f"{site}/bank_a"], flat[f"{site}/bank_b"], strict=True)
        parts += [Adapter(a, b, scale) for a, b in slots if a.any() and b.any()]
    if not parts:  # a bank alone, and empty
        parts = [Adapter(flat[f"{site}/bank_a"][0], flat[f"{site}/bank_b"][0], 1.0)]
    scale = parts[0].scale
    wide = [p.b.astype(np.float32) * np.float32(p.scale / scale) for p in parts]
    return Adapter(np.concatenate([p.a.astype(np.float32) for p in parts]), np.concatenate(wide, axis=1), scale)


def adapter_config(spec: Spec, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """LoRA's part of adapter_config.json. PEFT's factor is lora_alpha / r; alpha = scale r gives back the scale to the
    last bit."""
    first = next(iter(adapters.values()))
    rank, alpha = len(first.a), plain(first.scale * len(first.a))
    others = {m: one for m, one in adapters.items() if (len(one.a), one.scale) != (rank, first.scale)}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.adapter_dropout,
        "target_modules": modules(spec, list(adapters)),
        "rank_pattern": {pattern(m): len(one.a) for m, one in others.items()},
        "alpha_pattern": {pattern(m): plain(one.scale * len(one.a)) for m, one in others.items()},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
    }


def modules(spec: Spec, names: Sequence[str]) -> list[str]:
    """Short names (``q_proj``) where these are all modules of the model that end so, else the modules in full."""
    short = sorted({n.rpartition(".")[2] for n in names})
    every = (name.removesuffix(".weight") for path, name in form_of(spec).names.items() if path.endswith("/kernel"))
    return short if set(names) == {n for n in every if n.rpartition(".")[2] in short} else sorted(names)


def pattern(module: str) -> str:
    """A module's full name as the regular expression that PEFT takes it for."""
    return module.replace(".", r"\.")


def plain(value: float) -> float | int:
    """32 rather than 32.0."""
    return int(value) if value == int(value) else value


def base_name(source: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(what PEFT calls the base, its revision): the repository of a registered model or hub id, else the path."""
    name = source.get("model")
    name = (MODELS[name].hub or name) if name in MODELS else name
    if name is None or not is_hub_id(name):
        return name, None
    repo, _, revision = name.partition("@")
    return repo, revision or None
