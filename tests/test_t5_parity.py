"""T5 beside transformers and PEFT: random weights of small models, both ways, with and without adapters."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import support
from t5_models import BUCKETS, DISTANCE, SIZES, SPECS, VOCAB, batch, drawn, logits, prompts, texts, unigram, whole

from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.models import fetch
from jaxcl.models.export_hf import write_hf
from jaxcl.models.export_peft import write_peft
from jaxcl.models.generate import generate
from jaxcl.models.safetensors_file import read_safetensors
from jaxcl.models.t5 import apply, head
from jaxcl.models.t5_positions import bucket_of
from jaxcl.models.tokenizer import BPETokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
KINDS = {"v1.0": ("relu", True), "v1.1": ("gated-gelu", False)}
SMALL = {"v1.0": "t5-small", "v1.1": "v1_1-small"}
NEW = 8


def theirs(kind: str, **sizes):
    """A random T5 of transformers; of v1.1 with a head of its own, which transformers 5 would tie."""
    torch.manual_seed(0)
    projection, tied = KINDS[kind]
    config = transformers.T5Config(
        feed_forward_proj=projection, tie_word_embeddings=tied, decoder_start_token_id=0, dropout_rate=0.0, **sizes
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:
        drawn_head = torch.randn_like(model.shared.weight) * config.d_model**-0.5  # logits of size 1, as v1.0's are
        model.lm_head.weight = torch.nn.Parameter(drawn_head)
    return model.eval()


def tiny(kind: str):
    sizes = {"vocab_size": VOCAB, "d_model": SIZES["width"], "d_kv": SIZES["head_dim"], "d_ff": SIZES["mlp"]}
    sizes |= {"num_layers": SIZES["layers"], "num_heads": SIZES["heads"]}
    return theirs(
        kind, relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=DISTANCE, **sizes
    )


def worst(model, spec, params, rows) -> float:
    """The largest difference of a logit at any target."""
    given = batch(rows)
    got = logits(spec, params, whole(spec, params, given).hidden, np.maximum(given["targets_at"] - 1, 0))
    most = 0.0
    for i, (source, target) in enumerate(rows):
        with torch.no_grad():
            ids, inputs = torch.tensor([[*source, 1]]), torch.tensor([[0, *target[:-1]]])
            want = model(input_ids=ids, decoder_input_ids=inputs).logits[0].numpy()
        most = max(most, float(np.abs(got[i, : len(target)] - want).max()))
    return most


def greedy(model, spec, params, rows) -> None:
    ids, lengths = prompts(rows, 32)
    made, _ = jax.jit(functools.partial(generate, apply, head, spec, max_new=NEW, stop_ids=()))(params, ids, lengths)
    for i, (source, _) in enumerate(rows):
        inputs = torch.tensor([[*source, 1]])
        want = model.generate(inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert made[i].tolist() == want[0, 1:].tolist()


@pytest.mark.parametrize("both", [True, False])
def test_buckets(both):
    reference = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for buckets, distance in ((32, 128), (BUCKETS, DISTANCE), (64, 256)):
        relative = np.arange(-400, 401)
        want = reference(torch.tensor(relative), both, buckets, distance).numpy()
        assert np.array_equal(bucket_of(relative, both=both, buckets=buckets, distance=distance), want)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_generation_of_small_models(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    found = read_safetensors(tmp_path)
    assert found.spec == SPECS[kind]
    assert worst(model, found.spec, found.params, texts()) < 1e-4
    greedy(model, found.spec, found.params, texts())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_generation_at_the_public_sizes(kind, tmp_path):
    """The public config.json of t5-small and t5-v1_1-small, random weights."""
    sizes = {"v1.0": {}, "v1.1": {"d_ff": 1024, "num_layers": 8, "num_heads": 6}}[kind]
    model = theirs(kind, **sizes)
    model.save_pretrained(tmp_path)
    found = read_safetensors(tmp_path)
    difference = worst(model, found.spec, found.params, texts())
    print(f"{SMALL[kind]}: largest difference of a logit {difference:.1e}")
    assert difference < 1e-4
    greedy(model, found.spec, found.params, texts())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_and_its_tokenizer_load_there(kind, tmp_path):
    spec = SPECS[kind]
    params = drawn(spec, jax.random.key(0))
    words = BPETokenizer(unigram(), eos_id=1, pad_id=0, eos="</s>")
    write_hf(tmp_path, spec, params, words)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert worst(model, spec, params, texts()) < 1e-4
    greedy(model, spec, params, texts())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat  sat", "answer: no"):
        assert loaded(text)["input_ids"] == [*words.encode(text), 1]


def test_adapters_load_in_peft(tmp_path):
    """O-LoRA's live adapters and bank after two stages, at q and v of all attentions."""
    model = tiny("v1.1")
    model.save_pretrained(tmp_path / "base")
    unigram().save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    weights = read_safetensors(tmp_path / "base")
    base = {k: np.asarray(v) for k, v in weights.params.items()}
    given = {"spec": weights.spec, "params": {k: jax.numpy.asarray(v) for k, v in base.items()}}
    done = support.run([olora(rank=2, alpha=3.0, dropout=0.0, max_stages=2)], tmp_path / "run", n=2, **given)
    spec = done.loop.now.world.spec
    source = {"model": str(tmp_path / "base")}
    write_peft_into(tmp_path / "adapter", spec, done.params, base, source)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    before = worst(model, spec, done.params, texts())
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    config = adapted.peft_config["default"]
    assert set(config.target_modules) == {"q", "v"} and config.task_type == "SEQ_2_SEQ_LM"
    assert config.r == 4 and sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3 * 2 * 2
    assert worst(adapted, spec, done.params, texts()) < 1e-4 < before


@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_loads_in_peft(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "base")
    weights = read_safetensors(tmp_path / "base")
    base = {k: np.asarray(v) for k, v in weights.params.items()}
    given = {"spec": weights.spec, "params": {k: jax.numpy.asarray(v) for k, v in base.items()}}
    done = support.run([prompt_tuning(length=5, hidden=8)], tmp_path / "run", n=2, **given)
    write_peft_into(tmp_path / "prompt", done.loop.now.world.spec, done.params, base, {"model": str(tmp_path / "base")})
    before = worst(model, weights.spec, done.params, texts())
    prompted = peft.PeftModel.from_pretrained(model, tmp_path / "prompt").eval()
    assert worst(prompted, weights.spec, done.params, texts()) < 1e-4 < before


def write_peft_into(folder, spec, params, base, source) -> None:
    folder.mkdir()
    write_peft(folder, spec, params, base, source, None)


def test_a_run_from_a_folder_is_exported_merged(tmp_path):
    """`fetch.load` on what transformers wrote, one stage of LoRA, and the whole model back."""
    tiny("v1.0").save_pretrained(tmp_path / "base")
    unigram().save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    model, params, _, info = fetch.load(str(tmp_path / "base"))
    assert not info["dequantised"]
    method = lora(rank=2, dropout=0.0, targets=["attn/q", "mlp/*"])
    done = support.run([method], tmp_path / "run", n=1, spec=model.spec, params=params)
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", model.spec, done.params, None)
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert worst(loaded, model.spec, done.params, texts()) < 1e-4
