"""SentencePiece's Unigram (Kudo 2018) as T5 has it: a spiece.model file as the `tokenizers` library's tokenizer.

The file is a protocol buffer (sentencepiece_model.proto of the SentencePiece project); of its fields only those that
decide how a text is cut are read. Behind its pieces come T5's sentinels, ``<extra_id_99>`` first and ``<extra_id_0>``
last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.files import read_bytes
from ..errors import RequestError
from .spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN

LARGEST = 64 << 20
UNIGRAM = 1  # TrainerSpec.model_type
EOS, PAD = "</s>", "<pad>"


def backend(path: Path, sentinels: int = 100) -> Any:
    """A `tokenizers.Tokenizer` of a spiece.model. RequestError: no such file, a damaged one, one that is no Unigram."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces, kind, charsmap = _read(path)
    if kind != UNIGRAM:
        raise RequestError(f"{path}: a SentencePiece model of type {kind}; accepted: {UNIGRAM}, Unigram")
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    vocab = [(piece, score) for piece, score, _ in pieces]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    bytes_too = any(kind == BYTE for *_, kind in pieces)
    made = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=bytes_too))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    made.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    special = [piece for piece, _, kind in pieces if kind in (CONTROL, UNKNOWN)]
    special += [piece for piece, _ in vocab[len(pieces) :]]
    made.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if made.token_to_id(EOS) is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, made.token_to_id(EOS))]
        )
    return made


def _read(path: Path) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """([(piece, score, kind)], kind of the model, map of characters)."""
    pieces, kind, charsmap = [], UNIGRAM, b""
    try:
        for field, value in _fields(read_bytes(path, LARGEST)):
            if field == 1:
                of = dict(_fields(value))
                score = struct.unpack("<f", of[2])[0] if 2 in of else 0.0
                pieces.append((of[1].decode(), score, of.get(3, NORMAL)))
            elif field == 2:
                kind = dict(_fields(value)).get(3, UNIGRAM)
            elif field == 3:
                charsmap = dict(_fields(value)).get(2, b"")
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; accepted: a SentencePiece model") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise RequestError(f"{path}: not a SentencePiece model: {error}") from None
    if not pieces:
        raise RequestError(f"{path}: not a SentencePiece model: it has no pieces")
    return pieces, kind, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a message: whole numbers, else bytes. ValueError where it is cut off."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it is cut off")
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
