"""BPE over bytes as GPT-2 has it (Radford et al. 2019), and how its relatives cut text into words before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .spm import CONTROL, USER

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Pre(NamedTuple):
    """pattern: what a word is. digits: each stands alone before anything else. nfc: Unicode is normalised. whole: a
    word that is a token needs no merges."""

    pattern: str = GPT2
    digits: bool = False
    nfc: bool = False
    whole: bool = False


PRE = {
    "gpt-2": Pre(),
    "olmo": Pre(),
    "smollm": Pre(digits=True),
    "llama-bpe": Pre(_WORDS + r"\p{N}{1,3}" + _REST, whole=True),
    "dbrx": Pre(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": Pre(_WORDS + r"\p{N}" + _REST, nfc=True),
}
"""llama.cpp's names of pre-tokenizers; dbrx is also OLMo 2's."""


def backend(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], pre: Pre) -> Any:
    """A `tokenizers.Tokenizer`; merges: ``'left right'``, best first. Control and user's tokens are matched whole."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.whole))
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    cuts.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if pre.nfc:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, made.add_special_tokens), (USER, made.add_tokens)):
        add([AddedToken(t, normalized=False, special=kind == CONTROL) for t, k in zip(tokens, kinds) if k == kind])
    return made
