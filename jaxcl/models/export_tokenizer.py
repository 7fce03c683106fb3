"""A tokenizer as the files that transformers' AutoTokenizer reads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import BPETokenizer, ByteTokenizer

SPECIAL = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}  # the byte tokenizer's ids 256, 257, 258


def write_tokenizer(folder: Path, tokenizer: Any, context: int) -> tuple[dict[str, int | None], list[str]]:
    """(ids of the special tokens under their names in config.json, notes); nothing is written without a tokenizer.

    A token that there is not has the id None, written as null: left out, a model type's own default would stand in.

    Raises RequestError for a tokenizer of another type than jaxcl's two.
    """
    if tokenizer is None:
        none = dict.fromkeys(f"{name}_token_id" for name in SPECIAL)
        return none, ["no tokenizer: the run's experiment names none"]
    if isinstance(tokenizer, ByteTokenizer):
        backend, names, options = byte_backend(), SPECIAL, {"split_special_tokens": True}
        template = None
    elif isinstance(tokenizer, BPETokenizer):
        backend, template, options = tokenizer.backend, tokenizer.template, {}
        names = {"bos": tokenizer.names["bos_token"]}
        names |= {n: backend.id_to_token(i) for n, i in (("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))}
    else:
        raise RequestError(
            f"a tokenizer of type {type(tokenizer).__name__} has no Hugging Face form; "
            "accepted: ByteTokenizer, BPETokenizer"
        )
    names = {name: token for name, token in names.items() if token}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in names.items()},
        **options,
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    ids = {name: backend.token_to_id(token) for name, token in names.items()}
    return {f"{name}_token_id": ids.get(name) for name in SPECIAL}, []


def write_json(file: Path, value: Any) -> None:
    """One JSON file, as transformers writes them."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def byte_backend() -> Any:
    """The byte tokenizer in the `tokenizers` library: byte-level BPE without a merge, its ids the bytes themselves.

    Its special tokens are written as text only by ``split_special_tokens``: a text that holds "<eos>" is five bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # in GPT-2's alphabet as they are
    hidden = (b for b in range(256) if b not in shown)
    letters = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    backend = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL.values()])
    return backend
