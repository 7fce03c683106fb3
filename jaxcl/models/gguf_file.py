"""A GGUF file of a Llama-type model as spec and parameters, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError
from .gguf_header import Header, Tensor, read_header
from .names import is_flipped, match
from .spec import DecoderSpec

SIZES = {
    "layers": "block_count",
    "width": "embedding_length",
    "heads": "attention.head_count",
    "mlp": "feed_forward_length",
    "context": "context_length",
}


class Weights(NamedTuple):
    """What a weight file gives: spec, parameters (numpy, unstacked, [in, out]), the file's own metadata, and
    whether numbers were stored in fewer bits than float16 or bfloat16 and had to be de-quantised."""

    spec: DecoderSpec
    params: dict[str, np.ndarray]
    fields: dict[str, Any]
    dequantised: bool


def read_gguf(path: Path) -> Weights:
    """Reads a GGUF file; parameters are float32.

    llama.cpp stores the rows of q and k so that a rotary pair is adjacent; they are put back into halves. Raises
    RequestError on a damaged file, an architecture that is not llama, tensors that do not fit it, NaN or Inf.
    """
    header = read_header(path)
    spec = read_spec(header, path)
    table = match(spec, {name: tensor.shape for name, tensor in header.tensors.items()}, "gguf", str(path))
    data = np.memmap(path, np.uint8, "r")
    params = {}
    for ours, name in table.items():
        value = _numbers(data, header.tensors[name], f"{path}: {name!r}")
        if ours.endswith(("attn/q/kernel", "attn/k/kernel")):
            value = _halves(value, spec.head_dim)
        params[ours] = np.ascontiguousarray(value.T) if is_flipped(ours) else value
    return Weights(spec, params, header.fields, any(t.kind not in _WHOLE for t in header.tensors.values()))


_WHOLE = (0, 1, 30)  # F32, F16, BF16


def read_spec(header: Header, path: Path) -> DecoderSpec:
    """The spec a GGUF header describes. Raises RequestError where a key is absent or asks for what is not built."""
    fields = header.fields
    if fields.get("general.architecture") != "llama":
        raise RequestError(f"{path}: architecture {fields.get('general.architecture')!r}; accepted: 'llama'")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise RequestError(f"{path}: llama.rope.scaling.type is {scaling!r}; accepted: 'none'")

    def number(name: str, kind: type, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise RequestError(f"{path}: key 'llama.{name}' is {value!r}; accepted: {kind.__name__}")
        return kind(value)

    sizes = {ours: number(key, int) for ours, key in SIZES.items()}
    embed = header.tensors.get("token_embd.weight")
    if embed is None:
        raise RequestError(f"{path}: missing 'token_embd.weight'; accepted: a Llama-type model")
    if sizes["heads"] < 1:
        raise RequestError(f"{path}: key 'llama.attention.head_count' is {sizes['heads']}; accepted: above 0")
    head_dim = number("attention.key_length", int, sizes["width"] // sizes["heads"])
    if number("rope.dimension_count", int, head_dim) != head_dim:
        raise RequestError(f"{path}: llama.rope.dimension_count is not the head size; accepted: {head_dim}")
    return DecoderSpec(
        vocab=embed.shape[0],
        kv_heads=number("attention.head_count_kv", int, sizes["heads"]),
        head_dim=head_dim,
        rope_theta=number("rope.freq_base", float, 10000.0),
        norm_eps=_short(number("attention.layer_norm_rms_epsilon", float)),
        tied="output.weight" not in header.tensors,
        **sizes,
    )


def _short(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _numbers(data: np.ndarray, tensor: Tensor, where: str) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.kind)
    rows = data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
    try:
        value = np.array(dequantize(np.asarray(rows), kind), np.float32).reshape(tensor.shape)
    except NotImplementedError:
        raise RequestError(f"{where} is stored as {kind.name}; accepted: types the gguf package reads") from None
    if not np.isfinite(value).all():
        raise RequestError(f"{where} holds NaN or Inf; accepted: finite weights")
    return value


def _halves(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of [heads * head_dim, in] from (pair, member) order to (member, pair) order within each head."""
    pairs = value.reshape(-1, head_dim // 2, 2, value.shape[-1])
    return pairs.swapaxes(1, 2).reshape(value.shape)
