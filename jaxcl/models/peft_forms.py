"""Adapters other than LoRA as PEFT has them: tensors of adapter_model.safetensors, and their part of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcl.errors import RequestError
from jaxcl.models.export_hf import Spec, form_of
from jaxcl.models.prefix import materialised
from jaxcl.models.prompt import produced
from jaxcl.models.rope import rope, rotate
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.t5_spec import T5Spec
from jaxcl.surgery.scales import factors

PREFIX = "base_model.model."
Flat = Mapping[str, np.ndarray]
Form = Callable[[Any, Flat], tuple[dict[str, np.ndarray], dict[str, Any]]]


def ia3(spec: Spec, flat: Flat) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(IA)^3: ``ia3_l`` [out, 1] of a module's outputs, [1, in] of the inputs of one that is listed as feed-forward.

    Raises RequestError where a site is scaled on both sides, or the modules of one name on different sides.
    """
    tensors: dict[str, np.ndarray] = {}
    names = form_of(spec).names
    sides: dict[str, str] = {}
    for key in factors(flat):
        site, _, name = key.rpartition("/")
        module = names[site + "/kernel"].removesuffix(".weight")
        side, _, kind = name.partition("_")
        short = module.rpartition(".")[2]
        if f"{PREFIX}{module}.ia3_l" in tensors or sides.setdefault(short, side) != side:
            raise RequestError(f"{site!r}: PEFT's (IA)^3 scales one side of {short}; accepted: --format hf")
        factor = flat[key].astype(np.float32) + np.float32(kind == "delta")
        tensors[f"{PREFIX}{module}.ia3_l"] = np.ascontiguousarray(factor[None] if side == "in" else factor[:, None])
    modules = sorted(k.removeprefix(PREFIX).removesuffix(".ia3_l") for k in tensors)
    config = {
        "peft_type": "IA3",
        "target_modules": modules,
        "feedforward_modules": [m for m in modules if sides[m.rpartition(".")[2]] == "in"],
        "fan_in_fan_out": False,
    }
    return tensors, config


def prompt(spec: DecoderSpec, flat: Flat) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Prompt tuning: the rows as the model has them, its network computed."""
    rows = np.asarray(produced({k: jnp.asarray(v, jnp.float32) for k, v in flat.items() if k.startswith("prompt/")}))
    config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **virtual(spec, len(rows))}
    return {"prompt_embeddings": np.ascontiguousarray(rows)}, {**config, "token_dim": spec.width}


def prefix(spec: DecoderSpec, flat: Flat) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Prefix tuning: every layer's keys and values in turn, their network computed. PEFT counts the prefix' positions
    before the tokens' own, we do not: its keys are turned by as many.

    Raises RequestError for layers without a prefix, for windows, through which transformers sees a prefix, and for a
    T5, whose relative positions PEFT's prefix takes part in.
    """
    if isinstance(spec, T5Spec):
        raise RequestError("PEFT's prefix has relative positions in a T5, ours has none; accepted: a decoder's prefix")
    made = {k: jnp.asarray(v, jnp.float32) for k, v in flat.items() if "prefix" in k}
    made |= materialised(made)
    if spec.window is not None or any(f"layers/{i}/attn/prefix_k" not in made for i in range(spec.layers)):
        raise RequestError("PEFT's prefix is in every layer and seen by all tokens; accepted: no windows, all layers")
    length = len(made["layers/0/attn/prefix_k"])
    turned = rope(spec, "block", jnp.full((1, 1), length, jnp.int32))
    rows = []
    for i in range(spec.layers):
        k, v = (made[f"layers/{i}/attn/prefix_{n}"] for n in "kv")
        k = rotate(k.reshape(1, length, -1, spec.head_dim), turned).reshape(length, -1)
        rows += [np.asarray(k), np.asarray(v)]
    config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **virtual(spec, length)}
    kv = {"token_dim": spec.kv_width, "num_attention_heads": spec.kv_heads}
    return {"prompt_embeddings": np.concatenate(rows, axis=1)}, {**config, **kv}


def virtual(spec: DecoderSpec, length: int) -> dict[str, Any]:
    """What PEFT wants to know of a model that it puts ``length`` positions before."""
    sizes = {"num_attention_heads": spec.heads, "num_layers": spec.layers, "num_transformer_submodules": 1}
    return {"num_virtual_tokens": length, **sizes}


FORMS: dict[str, tuple[Callable[[str], bool], Form]] = {
    "(IA)^3": (lambda path: bool(factors([path])), ia3),
    "a soft prompt": (lambda path: path.startswith("prompt/"), prompt),
    "a prefix": (lambda path: "prefix" in path.replace("/", "_").split("_"), prefix),
}
"""{name: (whether a parameter is of this kind, how it is written)}."""


def kinds(paths: Any) -> list[str]:
    """Names of the forms that parameters among ``paths`` have."""
    return [name for name, (is_one, _) in FORMS.items() if any(is_one(path) for path in paths)]


def of_a_form(path: str) -> bool:
    """Whether a parameter belongs to one of the forms."""
    return any(is_one(path) for is_one, _ in FORMS.values())
