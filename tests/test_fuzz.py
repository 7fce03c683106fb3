"""Files that were altered, cut, or made up: each reader takes them or says one line, and does nothing else."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import pytest
from fuzz import Forbidden, any_json, damaged, guarded, odd_json, search
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_schemas import ALPACA, DOCUMENT, GOOD

from jaxcl.core.config import as_json, override, short_hash
from jaxcl.core.rundir import RunDir, dump
from jaxcl.data import jsonl
from jaxcl.data.jsonl import count_rows, iter_rows, read_rows
from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.models.gguf_file import read_gguf
from jaxcl.models.hf_config import FAMILIES, spec_from_hf
from jaxcl.models.layout import layout
from jaxcl.models.names import foreign_name, is_flipped
from jaxcl.models.safetensors_file import read_json, read_safetensors
from jaxcl.models.spec import DecoderSpec

ROWS: dict[str, list[dict[str, Any]]] = {k: [v] for k, v in GOOD.items()} | {
    "instruct": [{"task": "t", "id": "a", "instruction": "Say", "input": "x", "target": "y", "labels": ["y", "n"]}],
    "text": [{"id": "a", "text": "words", "date": "2020"}],
    "edit": [dict.fromkeys(("id", "subject", "prompt", "target", "locality_prompt", "locality_target"), "a")],
    "mcq": [{"task": "t", "id": "a", "question": "q", "choices": ["a", "b"], "answer": 1}],
    "probe": [{"id": "a", "relation": "r", "prompt": "p", "answers": ["a"], "choices": ["a", "b"], "answer": 0}],
    "preference": [{"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}],
    "tool": [GOOD["tool"], ALPACA],
    "retrieval": [GOOD["retrieval"], DOCUMENT],
}
MATRIX = {
    "schema": 1,
    "stages": [{"name": "s0", "evals": ["a"]}, {"name": "s1", "evals": ["b"]}],
    "evals": [
        {"id": i, "metric": "accuracy", "higher_is_better": True, "range": [0, 1], "n": 4, "role": "task", "pool": None}
        for i in "ab"
    ],
    "row0": [0.1, None], "rows": [[0.5, 0.1], [0.4, 0.9]], "random": [0.25, 0.25],
}  # fmt: skip
SPEC = DecoderSpec(vocab=16, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=8, context=16, tied=True)
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8, "max_position_embeddings": 16,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
GEMMA = CONFIG | {
    "model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 2
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "a"
    lr: float = 1e-3
    seed: int | None = 0
    on: bool = True
    mode: Literal["a", "b"] = "a"
    names: list[str] = dataclasses.field(default_factory=list)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    nested: tuple[tuple[float, ...], ...] = ()
    inner: Inner = Inner()


for made in (Inner, Config):  # types, not their text: what reads the settings compiles nothing then
    made.__annotations__ = typing.get_type_hints(made)


class Reader(NamedTuple):
    """files: {name: its damaged contents}, written into a folder one at a time; read: what reads that folder."""

    whole: Callable[[Path], None]
    files: Callable[[Path], dict[str, st.SearchStrategy[bytes]]]
    read: Callable[[Path], Any]


def rows_of(schema: str | None, name: str = "r.jsonl") -> Reader:
    rows = ROWS[schema or "instruct"]
    lines = [json.dumps(r).encode() for r in rows]
    plain = b"\n".join(lines) + b"\n"

    def contents(_: Path) -> dict[str, st.SearchStrategy[bytes]]:
        odd = st.sampled_from(rows).flatmap(odd_json).map(lambda line: line + b"\n" + plain)
        text = odd | damaged(plain) | st.binary(max_size=64)
        if name.endswith(".gz"):
            return {name: damaged(gzip.compress(plain)) | text.map(gzip.compress)}
        return {name: text}

    def write(folder: Path) -> None:
        (folder / name).write_bytes(gzip.compress(plain) if name.endswith(".gz") else plain)

    return Reader(write, contents, lambda folder: read_rows(folder / name, schema or "instruct"))


def json_file(name: str, values: list[Any], read: Callable[[Path], Any]) -> Reader:
    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(values[0]))

    return Reader(write, lambda _: {name: st.one_of(*map(any_json, values))}, lambda folder: read(folder / name))


def tensors(style: str) -> dict[str, np.ndarray]:
    rng, out = np.random.default_rng(0), {}
    for path, leaf in layout(SPEC).items():
        shape = leaf.shape[::-1] if is_flipped(path) else leaf.shape
        out[foreign_name(SPEC, path, style)] = rng.normal(size=shape).astype(np.float32)
    return out


def write_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    sizes = {"block_count": 2, "embedding_length": 8, "feed_forward_length": 8, "context_length": 16}
    for key, value in (sizes | {"attention.head_count": 2, "attention.head_count_kv": 1}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, value in tensors("gguf").items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder: Path) -> None:
    whole = tensors("hf")
    save_file(dict(list(whole.items())[:4]), folder / "a.safetensors")
    save_file(dict(list(whole.items())[4:]), folder / "b.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index()))


def index() -> dict[str, Any]:
    return {"weight_map": {n: "a.safetensors" if i < 4 else "b.safetensors" for i, n in enumerate(tensors("hf"))}}


def shards(folder: Path) -> dict[str, st.SearchStrategy[bytes]]:
    whole = (folder / "a.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    odd = odd_json(json.loads(whole[8:size])).map(lambda head: len(head).to_bytes(8, "little") + head + whole[size:])
    files = {"config.json": any_json(CONFIG), "model.safetensors.index.json": any_json(index())}
    return files | {"a.safetensors": damaged(whole) | damaged(whole[:size]) | odd | st.binary(max_size=64)}


def gguf_bytes(folder: Path) -> dict[str, st.SearchStrategy[bytes]]:
    whole = (folder / "m.gguf").read_bytes()
    head = whole.index(b"token_embd.weight")  # most of the file is numbers, which may be any
    start = damaged(whole[:head]).map(lambda b: b + whole[head:])
    return {"m.gguf": damaged(whole) | start | damaged(whole[: len(whole) // 3]) | st.binary(max_size=64)}


def finished(folder: Path) -> None:
    run = RunDir(folder)
    try:
        run.check({"experiment": "x", "config": {}})
    finally:
        run.close()


READERS = {
    **{f"jsonl {schema}": rows_of(schema) for schema in ROWS},
    "jsonl gz": rows_of(None, "r.jsonl.gz"),
    "matrix": json_file("matrix.json", [MATRIX], read_matrix),
    "run's config": json_file("config.json", [{"experiment": "x", "config": {}}], lambda f: finished(f.parent)),
    "hf config": json_file(
        "config.json",
        [*(CONFIG | {"model_type": k} for k in FAMILIES), GEMMA, {"model_type": "gemma3", "text_config": GEMMA}],
        lambda f: spec_from_hf(read_json(f), f),
    ),
    "gguf": Reader(write_gguf, gguf_bytes, lambda folder: read_gguf(folder / "m.gguf")),
    "safetensors": Reader(write_folder, shards, read_safetensors),
}  # fmt: skip


def fuzz(name: str, folder: Path, examples: int) -> None:
    reader = READERS[name]
    reader.whole(folder)
    good = {f.name: f.read_bytes() for f in folder.iterdir()}
    reader.read(folder)  # a whole file is taken, and imports what is needed
    files = reader.files(folder)

    def check(change: tuple[str, bytes]) -> None:
        file, content = change
        (folder / file).write_bytes(content)
        with guarded(sum(f.stat().st_size for f in folder.iterdir())):
            reader.read(folder)
        (folder / file).write_bytes(good[file])

    search(st.one_of(*(content.map(lambda c, f=f: (f, c)) for f, content in files.items())), check, examples)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_taken_or_refused_in_one_line(name, tmp_path):
    fuzz(name, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name, tmp_path):
    fuzz(name, tmp_path, 3000)


def settings_of() -> st.SearchStrategy[list[str]]:
    names = [f.name for f in dataclasses.fields(Config)] + ["inner.depth", "inner.sizes", "inner.depth.x", "lr.x", ""]
    odd = odd_json({"a": [1, "x", None], "b": {"c": 2}}).map(bytes.decode)
    odd |= odd_json([[1, 2.5], ["x"]]).map(bytes.decode)
    words = ["nan", "inf", "-1e999", "9" * 5000, "1_0", "True", "null", "[" * 5000, "\udcff", "٣", "a,b", "{}", "[]"]
    value = odd | st.sampled_from(words) | st.text(max_size=8)
    return st.lists(st.tuples(st.sampled_from(names), value).map("=".join) | st.text(max_size=8), max_size=3)


def check_settings(given: list[str]) -> None:
    with guarded(sum(map(len, given))):
        plain = as_json(override(Config(), given))
        assert len(short_hash(plain)) == 10 and json.loads(dump(plain).encode("utf-8")) == plain


def test_settings_of_the_command_line():
    search(settings_of(), check_settings, 150)


@pytest.mark.slow
def test_many_settings_of_the_command_line():
    search(settings_of(), check_settings, 5000)


def test_a_gzip_bomb_is_refused_by_its_line_or_by_its_whole_size(tmp_path, monkeypatch):
    """One long line, many empty lines, and many small rows: none is unpacked to its end."""
    most = 1 << 20
    monkeypatch.setattr(jsonl, "MAX_FILE", most)
    path, row = tmp_path / "r.jsonl.gz", b'{"a": 1}\n'
    for content, said in (
        (b" " * (jsonl.MAX_LINE + 9), "longer than 4 MiB"),
        (b"\n" * 2 * most, f"unpacks to more than {most} bytes"),
        (row * (2 * most // len(row)), f"unpacks to more than {most} bytes"),
    ):
        path.write_bytes(gzip.compress(content))
        with guarded(most), pytest.raises(RequestError, match=said):
            count_rows(path)
    path.write_bytes(gzip.compress(b"\n" * (most - len(row)) + row))
    assert list(iter_rows(path, None)) == [{"a": 1}], "up to the limit a small file is read"


@pytest.mark.parametrize("name", READERS)
def test_links_that_lead_nowhere_or_everywhere(name, tmp_path):
    reader = READERS[name]
    reader.whole(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for file in reader.files(tmp_path):
        good = (tmp_path / file).read_bytes()
        for target in ("/nowhere/at/all", "loop", ".", "/dev/zero", "/dev/null"):
            (tmp_path / file).unlink()
            (tmp_path / file).symlink_to(target)
            with guarded(1 << 20), pytest.raises(RequestError):
                reader.read(tmp_path)
        (tmp_path / file).unlink()
        (tmp_path / file).write_bytes(good)


def test_the_guard_sees_what_it_forbids(tmp_path):
    """The tests above could not fail if it did not."""

    def hang() -> None:
        while True:
            pass

    for act in (lambda: eval("1 + 1"), lambda: os.system("true"), lambda: (tmp_path / "x").write_text("x"), hang):
        with pytest.raises(Forbidden), guarded(0, seconds=0.3):
            act()
    with pytest.raises(AssertionError, match="bytes of memory"), guarded(0):
        np.zeros(32 << 20, np.uint8)
    with pytest.raises(AssertionError), guarded(0):
        raise RequestError("")
    with pytest.raises(KeyError), guarded(0):
        raise KeyError("x")
