"""A GGUF file as spec and parameters, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError
from .gguf_header import Tensor, read_header
from .gguf_spec import ROPE_FACTORS, read_spec
from .names import is_flipped, match


class Weights(NamedTuple):
    """What a weight file gives: spec, parameters (numpy, unstacked, [in, out]), the file's own metadata, and
    whether numbers were stored in fewer bits than float16 or bfloat16 and had to be de-quantised."""

    spec: Any
    params: dict[str, np.ndarray]
    fields: dict[str, Any]
    dequantised: bool


def read_gguf(path: Path) -> Weights:
    """Reads a GGUF file of architecture llama, qwen2, qwen3, gemma3 or olmo2; parameters are float32.

    Of llama, llama.cpp stores the rows of q and k so that a rotary pair is adjacent; they are put back into halves.
    Raises RequestError on a damaged file, another architecture, tensors that do not fit it, NaN or Inf.
    """
    header = read_header(path)
    data, tensors = np.memmap(path, np.uint8, "r"), dict(header.tensors)

    def numbers(tensor: Tensor, name: str) -> np.ndarray:
        return _numbers(data, tensor, f"{path}: {name!r}")

    factors = tensors.pop(ROPE_FACTORS, None)
    spec = read_spec(header, path, None if factors is None else numbers(factors, ROPE_FACTORS))
    table = match(spec, {name: tensor.shape for name, tensor in tensors.items()}, "gguf", str(path))
    adjacent = header.fields["general.architecture"] == "llama"
    params = {}
    for ours, name in table.items():
        value = numbers(tensors[name], name)
        if adjacent and ("/attn/q/" in ours or "/attn/k/" in ours):
            value = _halves(value, spec.head_dim)
        params[ours] = np.ascontiguousarray(value.T) if is_flipped(ours) else value
    return Weights(spec, params, header.fields, any(t.kind not in _WHOLE for t in header.tensors.values()))


_WHOLE = (0, 1, 30)  # F32, F16, BF16


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
    """Rows of [heads * head_dim, ...] from (pair, member) order to (member, pair) order within each head."""
    pairs = value.reshape(-1, head_dim // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)
