"""T5's files without torch: config.json, names of tensors, tokenizers, adapters for PEFT, spans cut out of text."""

from __future__ import annotations

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from t5_models import SPECS, drawn, unigram, write_base

from jaxcl.data.encode import fit_prompt
from jaxcl.data.span_corruption import corrupted, corrupted_source, counts, noise_mask
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.models import fetch
from jaxcl.models.export_hf import write_hf
from jaxcl.models.known import ON_HUB, T5
from jaxcl.models.safetensors_file import read_safetensors
from jaxcl.models.t5_hf import foreign_name, t5_config, t5_spec
from jaxcl.models.t5_spec import T5Spec, layout
from jaxcl.models.tokenizer import BPETokenizer, ByteTokenizer, from_folder

SPEC = SPECS["v1.1"]


@pytest.mark.parametrize("kind", SPECS)
def test_written_and_read_again_without_a_changed_number(kind, tmp_path):
    spec = SPECS[kind]
    params = {k: np.asarray(v) for k, v in drawn(spec, jax.random.key(0)).items()}
    assert write_hf(tmp_path, spec, params, None)
    found = read_safetensors(tmp_path)
    assert found.spec == spec
    assert found.params.keys() == params.keys() and all(np.array_equal(found.params[k], v) for k, v in params.items())
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not spec.tied)
    assert tensors["decoder.block.1.layer.1.EncDecAttention.v.weight"].shape == (24, 24)
    assert tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape == (8, 3)
    name = "decoder.block.1.layer.2.DenseReluDense." + ("wi_1" if spec.gated else "wi")
    np.testing.assert_array_equal(tensors[name + ".weight"].T, params["decoder/layers/1/mlp/up/kernel"])


def test_a_config_is_read_or_refused_by_key():
    config = t5_config(SPEC)
    assert t5_spec(config) == dataclasses.replace(SPEC, tied=True)  # whether it is, the weights say
    assert t5_spec({"model_type": "t5"}) == T5Spec(
        vocab=32128, width=512, layers=6, heads=8, head_dim=64, mlp=2048, dropout=0.1
    )  # fmt: skip
    assert not t5_spec({"tie_word_embeddings": False}).scaled and t5_spec({"tie_word_embeddings": True}).scaled
    assert not t5_spec({"tie_word_embeddings": True, "scale_decoder_outputs": False}).scaled  # transformers 5
    for key, value, words in (
        ("feed_forward_proj", "gated-silu", "'relu' or 'gated-gelu'"), ("num_decoder_layers", 3, "2, as many as"),
        ("d_model", "x", "a whole number"), ("is_decoder", True, "False or None"), ("dropout_rate", 1.5, "below 1"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"{key} is .*{words}"):
            t5_spec({**config, key: value})
    with pytest.raises(RequestError, match="no end mark"):
        t5_config(dataclasses.replace(SPEC, end=None))


def test_files_of_others(tmp_path):
    """Copies of the embedding and a bias that nothing reads are passed over; another tensor is not."""
    spec = SPECS["v1.0"]
    given = {k: np.asarray(v) for k, v in drawn(spec, jax.random.key(0)).items()}
    flipped = {k: v.T if k.endswith("/kernel") and k != "embed/kernel" else v for k, v in given.items()}
    tensors = {foreign_name(spec, k): v for k, v in flipped.items()}
    more = {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    more["lm_head.weight"] = tensors["shared.weight"]
    more["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((8, 3), np.float32)
    base = write_base(tmp_path / "base", t5_config(spec), tensors | more)
    model, params, words, _ = fetch.load(str(base))
    assert model.spec == spec and params["embed/kernel"].shape == (60, 24)
    assert all(np.array_equal(params[k], v) for k, v in given.items())
    assert isinstance(words, BPETokenizer) and words.eos_id == 1 and words.pad_id == 0 and words.start == ()
    write_base(tmp_path / "odd", t5_config(spec), tensors | {"encoder.extra": np.zeros(1, np.float32)})
    with pytest.raises(RequestError, match=r"unexpected 'encoder\.extra'"):
        read_safetensors(tmp_path / "odd")


def test_sizes_of_known_models():
    for repo, sizes in T5.items():
        T5Spec(**{"vocab": 32128, "head_dim": 64, **sizes})
        assert repo.startswith(("google-t5/", "google/"))
    assert {known.hub for known in ON_HUB.values()} <= set(T5)
    large = T5Spec(**{"vocab": 32128, "head_dim": 64, **T5["google-t5/t5-large"]})
    assert sum(int(np.prod(leaf.shape)) for leaf in layout(large).values()) == 737_668_096


def spiece(vocab: list[tuple[str, float, int]], kind: int = 1) -> bytes:
    """A SentencePiece model, as its protocol buffer is encoded."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        size, out = len(value), bytearray()
        while True:
            out.append(size & 127 | (128 if size > 127 else 0))
            size >>= 7
            if not size:
                return bytes([number << 3 | 2]) + bytes(out) + value

    pieces = [
        field(1, field(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, sort))
        for piece, score, sort in vocab
    ]
    return b"".join(pieces) + field(2, field(1, b"x" * 200) + field(3, kind)) + field(3, field(1, b"nmt_nfkc"))


def test_spiece_where_there_is_no_tokenizer_json(tmp_path):
    backend = unigram()
    state = json.loads(backend.to_str())["model"]["vocab"]
    known = {0: 3, 1: 3, 2: 2}
    pieces = [(p, s, known.get(i, 1)) for i, (p, s) in enumerate(state)]
    (tmp_path / "spiece.model").write_bytes(spiece(pieces))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 10}))
    words = from_folder(tmp_path)
    assert words.vocab_size == backend.get_vocab_size() and words.eos_id == 1 and words.pad_id == 0
    assert words.backend.token_to_id("<extra_id_0>") == words.vocab_size - 1
    for text in ("the cat  sat", "a hat, yes!", "answer: <extra_id_3> no", "zzz"):
        assert words.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
    assert words.backend.encode("a cat").ids[-1] == 1 and words.decode(words.encode("the  hat")) == "the hat"
    for data, reason in ((spiece(pieces)[:50], "cut off"), (spiece(pieces, kind=2), "of type 2"), (b"", "no pieces")):
        (tmp_path / "spiece.model").write_bytes(data)
        with pytest.raises(RequestError, match=reason):
            from_folder(tmp_path)


def test_a_prompt_is_cut_in_the_text_as_it_was_written():
    """Unigram's tokens do not give back double spaces: the cut goes by their places, not by what they decode to."""
    words = BPETokenizer(unigram(), eos_id=1, pad_id=0)
    text = "the  cat \n sat on   the mat and a dog"
    row = {"id": "r", "task": "t", "instruction": "a:", "input": text, "target": "yes"}
    full = words.encode(Template().prompt(row, words))
    ids = fit_prompt(row, Template(), words, len(full) - 4)
    assert len(full) - 8 <= len(ids) <= len(full) - 4
    assert words.decode(ids).startswith("a:the cat sat on the") or words.decode(ids).startswith("a: the cat sat on the")
    assert words.decode(ids).endswith("nswer:")  # its vocabulary has no capitals


def test_spans_by_the_paper():
    """15% of the tokens in spans of 3; figure 2's example; everything is in the source or in the target."""
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    assert corrupted(np.arange(10), mask, 99) == ([0, 1, 99, 4, 5, 6, 7, 98, 9], [99, 2, 3, 98, 8, 97])
    assert counts(512) == (77, 26)  # the T5 code: 512 tokens have 77 noise tokens in 26 spans
    for seed in range(5):
        cut = noise_mask(100, np.random.default_rng(seed))
        assert cut.sum() == 15 and not cut[0] and cut[-1]
        assert int(np.sum(cut & ~np.roll(cut, 1))) == 5


def test_rows_of_corrupted_text():
    words, texts = ByteTokenizer(), ["the cat sat on the mat", "a dog and a hat"] * 8
    make = lambda seed: corrupted_source("s", texts, words, window=48, top=255, seed=seed)  # noqa: E731
    rows, again, other = make(3), make(3), make(4)
    whole = [i for text in texts for i in (*words.encode(text), words.eos_id)]
    raw, back = len(rows._block(0)), []
    for i in range(len(rows)):
        row = rows[i]
        assert all(np.array_equal(row[k], again[i][k]) for k in row) and rows[i]["tokens"].shape == (48,)
        at = row["targets_at"][row["targets_at"] > 0]
        source, target = row["tokens"][: at[0]].tolist(), row["tokens"][at].tolist()
        assert target[-1] == words.eos_id and row["weight"].sum() == len(at)
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token > 200 and token < 256:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert sorted(spans, reverse=True) == list(range(255, 255 - len(spans), -1)) and not spans[min(spans)]
        back += [t for token in source for t in spans.get(token, [token])]
    assert back == whole[: len(back)] and len(whole) - len(back) <= 1
    assert any(not np.array_equal(rows[i]["tokens"], other[i]["tokens"]) for i in range(len(rows)))
    used = int((rows[0]["segments"] > 0).sum())
    assert 45 <= used <= 48 and raw < 48


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"span": 0.5}, {"window": 4}, {"window": 4000}, {"documents": []}, {"top": 258}]
)
def test_spans_that_cannot_be(wrong):
    given = {"documents": ["some text"] * 200, "window": 64, "top": 255, **wrong}
    with pytest.raises(RequestError, match=r"accepted|no training rows|which marks an end; give top"):
        corrupted_source("s", given.pop("documents"), ByteTokenizer(), **given)
