"""What `jaxcl export` writes, loaded by transformers and PEFT: the logits of the model that was trained."""

from __future__ import annotations

import functools
import json

import bases
import jax
import numpy as np
import pytest
import support

from jaxcl.methods.finetune import finetune
from jaxcl.methods.ia3 import ia3
from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora
from jaxcl.methods.prefix_tuning import prefix_tuning
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.models import fetch
from jaxcl.models.decoder import apply, head
from jaxcl.models.export import export
from jaxcl.models.export_hf import write_hf
from jaxcl.models.export_tokenizer import write_tokenizer
from jaxcl.models.safetensors_file import read_safetensors
from jaxcl.models.tokenizer import ByteTokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

METHODS = {
    "lora": [lora(**bases.LORA)],
    "olora": [olora(**bases.LORA)],
    "full": [finetune()],
}
OTHERS = {  # {adapter: (method, its parameters in PEFT, how many of them)}
    "ia3": ([ia3()], "ia3_l", 3 * bases.LAYERS),
    "prefix_tuning": ([prefix_tuning(length=5, hidden=8)], "prompt_encoder", 1),
    "prompt_tuning": ([prompt_tuning(length=5, hidden=8)], "prompt_encoder", 1),
}
LONGEST = 64  # tokens; padding stands behind the text, where nothing looks
ADAPTERS = [name for name in METHODS if name != "full"]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def base(room):
    return bases.write_base(room / "base")


@pytest.fixture(scope="module")
def runs(room, base):
    """{method: a run of two stages}, made when asked for."""
    made: dict[str, support.Done] = {}

    def run(name: str) -> support.Done:
        if name not in made:
            made[name] = bases.run(base, METHODS[name], room / name)
        return made[name]

    return run


def ours(spec, params, ids: list[int]) -> np.ndarray:
    """Logits f32[T, V] after every token."""
    tokens = np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_logits(spec, params, tokens))[0, : len(ids)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(spec, params, tokens):
    at = np.arange(LONGEST, dtype=np.int32)[None]
    batch = {"tokens": tokens, "segments": np.ones_like(at), "positions": at}
    return head(spec, params, apply(spec, params, batch).hidden, at)


def theirs(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -len(ids) :].numpy()  # a soft prompt has logits of its own


def compare(done: support.Done, model, words) -> None:
    """Token ids and logits on text, with nothing special added."""
    spec, own = done.loop.now.world.spec, done.loop.exp.tokenizer
    before = done.loop.exp.params
    for text in (*bases.TEXTS, "cat<end>hat"):
        ids = own.encode(text)
        assert words.encode(text, add_special_tokens=False) == ids and words.decode(ids) == own.backend.decode(
            ids, skip_special_tokens=False
        )
        want = ours(spec, done.params, ids)
        np.testing.assert_allclose(theirs(model, ids), want, atol=1e-4)
        assert np.abs(ours(done.loop.exp.model.spec, before, ids) - want).max() > 0.01, "training changed something"


@pytest.mark.parametrize("name", METHODS)
def test_transformers_loads_the_whole_model(runs, room, name):
    done, out = runs(name), room / f"{name}-hf"
    export(str(done.out), "hf", str(out))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    words = transformers.AutoTokenizer.from_pretrained(out)
    compare(done, model, words)
    messages = [{"role": "user", "content": "hi"}]
    assert words.apply_chat_template(messages, tokenize=False) == done.loop.exp.tokenizer.chat(messages)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (None, 269, 269)
    assert (words.eos_token_id, words.pad_token_id, words.model_max_length) == (269, 269, 96)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_the_adapters_on_the_base(runs, room, base, name):
    done, out = runs(name), room / f"{name}-peft"
    export(str(done.out), "peft", str(out))
    bare = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    adapted = peft.PeftModel.from_pretrained(bare, out).eval()
    weights = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(weights) == 8 and all(p.abs().max() > 0 for p in weights)
    words = transformers.AutoTokenizer.from_pretrained(out)
    compare(done, adapted, words)
    compare(done, adapted.merge_and_unload(), words)
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()  # finds the base by the name in the config
    compare(done, by_name, words)


@pytest.mark.parametrize("name", OTHERS)
def test_peft_loads_adapters_of_other_kinds(room, base, name):
    import optax

    methods, part, count = OTHERS[name]
    done = bases.run(base, methods, room / name, tx=optax.adam(0.1))
    out = room / f"{name}-peft"
    export(str(done.out), "peft", str(out))
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out).eval()
    assert len([n for n, _ in adapted.named_parameters() if part in n]) == count
    words = transformers.AutoTokenizer.from_pretrained(out)
    compare(done, adapted, words)
    if name == "ia3":
        compare(done, adapted.merge_and_unload(), words)


def test_adapters_of_unlike_ranks_reach_their_sites(room, base):
    """Three ranks and scales, one of them on a single layer."""
    from jaxcl.models.export_peft import write_peft

    model, params, words, info = fetch.load(str(base))
    rng, adapted = np.random.default_rng(0), support.to_numpy(params)
    for site, rank, scale in (
        *((f"layers/{i}/attn/q", 2, 4.0) for i in range(2)),
        *((f"layers/{i}/mlp/gate", 3, 0.7) for i in range(2)),
        ("layers/1/mlp/down", 5, 1.0),
    ):
        wide, out = adapted[site + "/kernel"].shape
        adapted[site + "/lora_a"] = 0.3 * rng.normal(size=(rank, wide)).astype(np.float32)
        adapted[site + "/lora_b"] = 0.3 * rng.normal(size=(out, rank)).astype(np.float32)
        adapted[site + "/lora_scale"] = np.float32(scale)
    (room / "unlike").mkdir()
    write_peft(room / "unlike", model.spec, adapted, params, info, words)
    got = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), room / "unlike")
    ids = words.encode(bases.TEXTS[0])
    want = ours(model.spec, adapted, ids)
    np.testing.assert_allclose(theirs(got.eval(), ids), want, atol=1e-4)
    assert np.abs(want - ours(model.spec, params, ids)).max() > 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_shards(tmp_path, tied):
    model, params, words, _ = fetch.load(str(bases.write_base(tmp_path / "base", tied)))
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", model.spec, params, words, shard_bytes=20_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = words.encode(bases.TEXTS[0])
    np.testing.assert_allclose(theirs(loaded, ids), ours(model.spec, params, ids), atol=1e-4)


def test_the_byte_tokenizer_in_transformers(tmp_path):
    write_tokenizer(tmp_path, ByteTokenizer(), 64)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*bases.TEXTS, "a <eos> b<pad>\n\n  c"):
        assert words.encode(text) == words(text)["input_ids"] == list(text.encode())
        assert words.decode([256, *text.encode(), 257, 258], skip_special_tokens=True) == text
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (256, 257, 258)


def families() -> list[str]:
    from test_decoder_parity import FAMILIES

    return list(FAMILIES)


@pytest.mark.parametrize("name", families())
def test_every_family_goes_through_us_and_back(name, tmp_path):
    """A random model that transformers saves, we read and write, transformers reads: the same logits."""
    from test_decoder_parity import FAMILIES, SIZES, drawn

    model = drawn(*FAMILIES[name])
    model.save_pretrained(tmp_path / "theirs")
    weights = read_safetensors(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", weights.spec, weights.params, None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == again.config.model_type
    assert type(again) is type(model) or name == "mistral, no window"  # which is Llama under another name
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], 24).tolist()
    want = theirs(model, ids)
    assert want.std() > 0.3
    np.testing.assert_allclose(theirs(again, ids), want, atol=1e-5)
