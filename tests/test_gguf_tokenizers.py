"""Tokenizers built from what a GGUF file says: SentencePiece's merging, and how words are cut before byte-level BPE."""

from __future__ import annotations

import re

import numpy as np
import pytest

from jaxcl.data.blocks import tokenized
from jaxcl.data.encode import begun
from jaxcl.errors import RequestError
from jaxcl.evaluate.nll import text_nll
from jaxcl.models import spm
from jaxcl.models.byte_bpe import PRE
from jaxcl.models.tokenizer import ByteTokenizer, from_gguf

SPACE = spm.SPACE
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = {"<unk>": 2, "<s>": 3, "</s>": 3, "\n\n": 4, "  ": 4}


def spm_fields(pieces: dict[str, float], **more) -> dict:
    """The metadata of a SentencePiece vocabulary: special tokens, 256 bytes, pieces with their scores."""
    tokens = [*SPECIAL, *BYTES, *pieces]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-1000.0] * len(SPECIAL) + [0.0] * 256 + list(pieces.values()),
        "token_type": [*SPECIAL.values(), *[6] * 256, *[1] * len(pieces)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (fields | more).items()}


def random_pieces() -> dict[str, float]:
    """Letters, and unions of earlier pieces with scores that fall, as SentencePiece's trainer makes them."""
    rng = np.random.default_rng(0)
    made = list("abc" + SPACE)
    while len(made) < 40:
        union = "".join(rng.choice(made, 2))
        if union not in made and len(union) < 6:
            made.append(union)
    return {piece: float(-i) for i, piece in enumerate(made)}


def by_hand(pieces: dict[str, float], text: str) -> list[str]:
    """The best neighbours first, the leftmost first."""
    parts = list(text.replace(" ", SPACE))
    while True:
        unions = [a + b for a, b in zip(parts, parts[1:])]  # noqa: RUF007
        known = [(-pieces[u], i) for i, u in enumerate(unions) if u in pieces]
        if not known:
            return parts
        i = min(known)[1]
        parts[i : i + 2] = [unions[i]]


def test_sentencepiece_merges_by_score():
    pieces = random_pieces()
    fields = spm_fields(pieces)
    tokenizer, names = from_gguf(fields, "x"), fields["tokenizer.ggml.tokens"]
    rng, longest = np.random.default_rng(1), 0
    for _ in range(200):
        text = re.sub(" +", " ", "".join(rng.choice(list("abc "), rng.integers(1, 14))))
        got = [names[i] for i in tokenizer.encode(text)]
        assert got == by_hand(pieces, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        longest = max(longest, max(map(len, got)))
    assert longest > 3


def test_bytes_users_tokens_and_control_tokens():
    fields = spm_fields({"a": -1.0, SPACE: -2.0, SPACE + "a": -3.0})
    tokenizer = from_gguf(fields, "x")
    at = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("é") == [at["<0xC3>"], at["<0xA9>"]] and tokenizer.decode(tokenizer.encode("é")) == "é"
    assert tokenizer.encode("a  a\n\na a") == [at[t] for t in ("a", "  ", "a", "\n\n", "a", SPACE + "a")]
    assert tokenizer.encode("<s>a</s>") == [1, at["a"], 2] and tokenizer.decode([1, at["a"], 2]) == "a"
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 2, len(at))


def test_a_space_before_the_text_where_the_file_asks_for_it():
    """Llama 2's: once at the start, not after every special token, and gone again when decoded."""
    fields = spm_fields({"a": -1.0, SPACE: -2.0, SPACE + "a": -3.0})
    del fields["tokenizer.ggml.add_space_prefix"]  # llama.cpp's default
    tokenizer = from_gguf(fields, "x")
    at = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("a a") == [at[SPACE + "a"]] * 2 and tokenizer.decode(tokenizer.encode("a a")) == "a a"


WORDS = {
    "gpt-2": ["I", "'ll", " pay", " 12345", "€!", "\n\n ", " OK", "'", "S"],
    "smollm": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€!", "\n\n ", " OK", "'", "S"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", "€!\n\n", " ", " OK", "'S"],
    "qwen2": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€!\n\n", " ", " OK", "'S"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_are_cut_as_each_family_does(name):
    """By hand: what counts as a word, how many digits stand together, where line ends go, whether 'S is like 's."""
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    fields = {"model": "gpt2", "pre": name, "tokens": ["<eos>", *alphabet], "merges": [], "eos_token_id": 0}
    tokenizer = from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "x")
    text = "".join(WORDS[name])
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cut] == WORDS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é" if PRE[name].nfc else "e\u0301")


def test_words_that_are_tokens_need_no_merges_in_llama_3():
    tokens = ["<eos>", "a", "b", "c", "bc", "abc"]
    for name, want in (("llama-bpe", [5]), ("gpt-2", [1, 4])):
        fields = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": ["b c"], "eos_token_id": 0}
        assert from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "x").encode("abc") == want


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "bert"}, "tokenizer 'bert' with 'None'; accepted: 'llama', or 'gpt2' with gpt-2"),
        ({"scores": [1.0]}, "'tokenizer.ggml.scores' is absent or short; accepted: 262 numbers"),
        ({"token_type": ["x"] * 262}, "token_type' is absent or short"),
        ({"eos_token_id": 999}, "eos_token_id is 999"),
        ({"tokens": None}, "a list of strings"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(RequestError, match=says):
        from_gguf(spm_fields({"a": -1.0}) | {f"tokenizer.ggml.{k}": v for k, v in change.items()}, "x")


@pytest.mark.parity
def test_qwen_2_beside_transformers():
    """Its class with a vocabulary of bytes and a few merges."""
    transformers = pytest.importorskip("transformers")
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    merges = ["l l", "Ġ p", "Ġp a", "Ġpa y", "1 2", "! Ċ"]
    tokens = ["<|endoftext|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    vocab, pairs = {token: i for i, token in enumerate(tokens)}, [tuple(merge.split()) for merge in merges]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=pairs)
    fields = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": merges, "eos_token_id": 0}
    ours = from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "x")
    for text in ("I'll pay 12345€!\n\n  OK'S", "e\u0301 🙂\t\r\nx", "   y", "Привет, 你好"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_what_every_sequence_begins_with():
    """Where the file says that bos is added, prompts, documents and windows of text start with it, and only once."""
    fields = spm_fields({"a": -1.0, SPACE: -2.0})
    tokenizer = from_gguf(fields, "x")
    a = tokenizer.encode("a")[0]
    assert tokenizer.start == (1,) and tokenizer.encode("aa") == [a, a]
    assert begun(tokenizer, "a") == [1, a] == begun(tokenizer, "<s>a")
    ids, ends = tokenized(["a", "aa"], tokenizer)
    assert ids.tolist() == [1, a, 2, 1, a, a, 2] and ends.tolist() == [3, 7]
    (_, example), *_ = text_nll("t", [{"id": "0", "text": "aa"}], tokenizer, window=4).run.windows
    assert example["tokens"].tolist()[:3] == [1, a, a] and example["weight"].tolist() == [0, 1, 1, 0]
    without = from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}, "x")
    assert without.start == () and begun(without, "a") == [a] and ByteTokenizer().start == ()
