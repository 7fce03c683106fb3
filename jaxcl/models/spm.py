"""The BPE of SentencePiece (Kudo and Richardson 2018), from a vocabulary with scores, as the `tokenizers` library's.

SentencePiece always merges the two neighbours whose union has the best score, the leftmost first. That is BPE in which
every way to cut a piece in two known ones is a merge, ranked by the piece's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens
SPACE = "\u2581"


def backend(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, prefix: bool) -> Any:
    """A `tokenizers.Tokenizer`. Bytes stand for characters that are no token; control and user's tokens are matched
    whole, in the text as it is, before anything else. prefix: a space is put before the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {token: score for token, score, kind in zip(tokens, scores, kinds) if kind == NORMAL}
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab, merges=merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds
    )
    made = Tokenizer(model)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        back.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence(back)
    for kind, add in ((CONTROL, made.add_special_tokens), (USER, made.add_tokens)):
        add([AddedToken(t, normalized=False, special=kind == CONTROL) for t, k in zip(tokens, kinds) if k == kind])
    return made


def merges(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every (left, right) of pieces whose union is a piece, best score first; of one piece, the longest left first."""
    found = []
    for piece, score in pieces.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, -cut, left, right))
    found.sort(key=lambda each: each[:2])
    return [(left, right) for _, _, left, right in found]
