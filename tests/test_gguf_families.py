"""GGUF files of five architectures and eight types of numbers, written by the gguf package or block by block."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES
from gguf.constants import GGMLQuantizationType as Kind

from jaxcl.errors import RequestError
from jaxcl.models.gguf_file import read_gguf
from jaxcl.models.layout import layout
from jaxcl.models.names import foreign_name
from jaxcl.models.spec import QKV, DecoderSpec, RopeScaling

SIZES = {"vocab": 32, "width": 32, "layers": 7, "heads": 4, "kv_heads": 2, "head_dim": 10, "mlp": 64, "context": 128}
GEMMA = {
    "norms": "both",
    "qk_norm": "head",
    "activation": "gelu_tanh",
    "embed_scale": 32**0.5,
    "attn_scale": 10**-0.5,
    "window": 16,
    "local_theta": 10000.0,
    "rope_theta": 1e6,
    "segments": (((("local",) * 5 + ("block", "local")), 1),),
}
SPECS = {
    "llama": DecoderSpec(**SIZES, tied=False),
    "qwen2": DecoderSpec(**SIZES, biases=QKV, rope_theta=1e6),
    "qwen3": DecoderSpec(**SIZES, qk_norm="head"),
    "gemma3": DecoderSpec(**SIZES, **GEMMA),
    "olmo2": DecoderSpec(**SIZES, norms="post", qk_norm="width", tied=False),
}


def weights(spec: DecoderSpec) -> dict[str, np.ndarray]:
    """Under our names, random throughout."""
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in layout(spec).items()}


def adjacent(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's order of a llama's query and key rows: (member, pair) within a head becomes (pair, member)."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, inner = divmod(row, head_dim)
        pair, member = divmod(inner, 2)
        out[row] = rows[head * head_dim + member * (head_dim // 2) + pair]
    return out


def write(path: Path, arch: str, spec: DecoderSpec, params: dict, more=None, blocks=None, extra=None) -> Path:
    """A file as llama.cpp's converter makes it. more: changes of its keys. blocks: {our path: (bytes, type)}. extra:
    further tensors."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "block_count": spec.layers,
        "context_length": spec.context,
        "embedding_length": spec.width,
        "feed_forward_length": spec.mlp,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": spec.rope_theta,
    }
    if spec.window:
        keys["attention.sliding_window"] = spec.window
    for name, value in (keys | (more or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{arch}.{name}", value)
    number = next(k for k, name in MODEL_ARCH_NAMES.items() if name == arch)
    theirs = gguf.get_tensor_name_map(number, spec.layers)
    for ours, value in params.items():
        name = theirs.get_name(foreign_name(spec, ours, "hf"), (".weight", ".bias"))
        assert name is not None, ours
        if ours.endswith("/kernel") and ours != "embed/kernel":
            value = value.T
        if arch == "llama" and ("attn/q/" in ours or "attn/k/" in ours):
            value = adjacent(value, spec.head_dim)
        if ours in (blocks or {}):
            data, kind = blocks[ours]
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", SPECS)
def test_an_architecture_is_read_as_it_was_written(tmp_path, arch):
    spec, params = SPECS[arch], weights(SPECS[arch])
    got = read_gguf(write(tmp_path / "m.gguf", arch, spec, params))
    assert got.spec == spec and not got.dequantised
    assert got.params.keys() == params.keys()
    for path, value in params.items():
        assert np.array_equal(got.params[path], value), path


def test_biases_of_a_llama_turn_with_their_rows(tmp_path):
    spec = dataclasses.replace(SPECS["llama"], biases=(*QKV, "attn/o"))
    params = weights(spec)
    got = read_gguf(write(tmp_path / "m.gguf", "llama", spec, params))
    assert got.spec == spec and all(np.array_equal(got.params[k], v) for k, v in params.items())


def test_gemma_as_the_file_or_llama_cpp_says(tmp_path):
    spec, params = SPECS["gemma3"], weights(SPECS["gemma3"])

    def read(more: dict) -> DecoderSpec:
        return read_gguf(write(tmp_path / "m.gguf", "gemma3", spec, params, more)).spec

    pattern = "attention.sliding_window_pattern"
    assert read({pattern: 2}).kinds == ("local", "block") * 3 + ("local",)
    assert read({pattern: [False] + [True] * 6}).kinds == ("block",) + ("local",) * 6
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    stretched = read({**linear, "rope.freq_base_swa": 500.0})
    assert stretched.rope_scaling == RopeScaling("linear", 8.0) and stretched.local_theta == 500.0


def test_llama_31_is_recognised_by_its_rotary_factors(tmp_path):
    """What llama.cpp's converter stores: what each rate is divided by, from Meta's formula on wavelengths."""
    spec = dataclasses.replace(SPECS["llama"], rope_theta=5e5, head_dim=32)
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 32, 2) / 32)
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 32 + smooth)
    factors = np.where(wavelengths < 2048, 1, np.where(wavelengths > 8192, 32, between)).astype(np.float32)
    assert len(set(factors.tolist())) > 2
    path = tmp_path / "m.gguf"
    got = read_gguf(write(path, "llama", spec, weights(spec), extra={"rope_freqs.weight": factors}))
    assert got.spec == dataclasses.replace(spec, rope_scaling=RopeScaling("llama3", 32.0))
    factors[4] = 3.0
    with pytest.raises(RequestError, match=r"'rope_freqs.weight' is \[1.0, .*accepted: \[1.0"):
        read_gguf(write(path, "llama", spec, weights(spec), extra={"rope_freqs.weight": factors}))


@pytest.mark.parametrize(
    ("arch", "more", "says"),
    [
        ("llama", {"rope.scaling.type": "yarn"}, "rope.scaling.type' is 'yarn'"),
        ("llama", {"expert_count": 8}, "expert_count' is 8; accepted: 0"),
        ("qwen2", {"attention.sliding_window": 64}, "sliding_window' is 64; accepted: 0"),
        ("qwen3", {"attention.value_length": 20}, "value_length' is 20; accepted: 10"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping' is 30.0"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "accepted: 7 values"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "accepted: above 0"),
        ("olmo2", {"attention.head_count": "x"}, "is 'x'; accepted: int"),
    ],
)
def test_keys_that_ask_for_what_is_not_built(tmp_path, arch, more, says):
    with pytest.raises(RequestError, match=says):
        read_gguf(write(tmp_path / "m.gguf", arch, SPECS[arch], {"embed/kernel": np.ones((32, 32), np.float32)}, more))


WIDE = DecoderSpec(vocab=8, width=256, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=4)
SITE = "layers/0/mlp/gate/kernel"  # [256, 4] with us, 4 rows of 256 in the file


def half(raw: np.ndarray) -> float:
    return float(raw.copy().view(np.float16)[0])


def small(block: np.ndarray, kind: Kind) -> list[float]:
    """32 numbers of a block with one scale: Q8_0, Q4_0, and Q4_1 with a minimum."""
    if kind == Kind.Q8_0:
        return [half(block[:2]) * int(v) for v in block[2:].view(np.int8)]
    start = 2 if kind == Kind.Q4_0 else 4
    nibbles = [v & 15 for v in block[start:].tolist()] + [v >> 4 for v in block[start:].tolist()]
    if kind == Kind.Q4_0:
        return [half(block[:2]) * (n - 8) for n in nibbles]
    return [half(block[:2]) * n + half(block[2:4]) for n in nibbles]


def q4_k(block: np.ndarray) -> list[float]:
    """256 numbers: eight runs of 32 with six-bit scales and minima, packed into twelve bytes."""
    d, least, packed = half(block[:2]), half(block[2:4]), block[4:16].tolist()
    out = []
    for run in range(8):
        if run < 4:
            scale, lower = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = (packed[run + 4] & 15) | (packed[run - 4] >> 6) << 4
            lower = (packed[run + 4] >> 4) | (packed[run] >> 6) << 4
        quarter = block[16 + 32 * (run // 2) :][:32].tolist()
        out += [d * scale * (v >> 4 if run % 2 else v & 15) - least * lower for v in quarter]
    return out


def q6_k(block: np.ndarray) -> list[float]:
    """256 numbers of six bits, four low and two high, with an eight-bit scale for every 16."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:])
    out = np.zeros(256)
    for i in range(256):
        part, at = divmod(i, 128)
        quarter, l = divmod(at, 32)
        four = int(low[64 * part + 32 * (quarter % 2) + l])
        four = four >> 4 if quarter >= 2 else four & 15
        two = int(high[32 * part + l]) >> 2 * quarter & 3
        out[i] = d * int(scales[i // 16]) * ((four | two << 4) - 32)
    return out.tolist()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_quantised_blocks_by_hand(tmp_path, kind):
    """Random bytes with scales that are ordinary numbers, de-quantised with the format's definition written out."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (4 * 256 // count, size)).astype(np.uint8)
    at = {Kind.Q6_K: [208], Kind.Q4_K: [0, 2], Kind.Q4_1: [0, 2]}.get(kind, [0])
    for start in at:
        drawn = rng.uniform(0.01, 0.1, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = drawn[:, None].view(np.uint8)
    by_hand = {Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}.get(kind, lambda block: small(block, kind))
    want = np.array([by_hand(block) for block in blocks]).reshape(4, 256).T
    stored = {SITE: (blocks.reshape(4, -1), kind)}
    got = read_gguf(write(tmp_path / "m.gguf", "llama", WIDE, weights(WIDE), blocks=stored))
    assert got.dequantised
    np.testing.assert_allclose(got.params[SITE], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_half_precision_is_not_called_quantised(tmp_path, kind):
    params = weights(WIDE)
    value = np.ascontiguousarray(params[SITE].T)
    bits = value.astype(np.float16) if kind == Kind.F16 else gguf.quants.quantize(value, kind)
    got = read_gguf(write(tmp_path / "m.gguf", "llama", WIDE, params, blocks={SITE: (bits, kind)}))
    assert not got.dequantised
    np.testing.assert_allclose(got.params[SITE], params[SITE], rtol=2**-8 if kind == Kind.BF16 else 2**-10, atol=1e-6)
