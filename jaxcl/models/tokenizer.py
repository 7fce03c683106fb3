"""Text to token ids and back: bytes for small models, BPE from a GGUF vocabulary, any tokenizer.json, T5's pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError, shown
from . import byte_bpe, spm, unigram
from .safetensors_file import read_json

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """encode does not add bos or eos; decode leaves special tokens out. start: what every sequence of the model begins
    with, Gemma's bos for one; most have nothing. chat: the messages ({'role', 'content'}) in the model's own template,
    ready for the assistant's answer; RequestError where it has none."""

    @property
    def start(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def chat(self, messages: Sequence[Message]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, then bos, eos, pad. Bytes that are no UTF-8 decode to U+FFFD."""

    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    start: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, messages: Sequence[Message]) -> str:
        raise RequestError("a byte tokenizer has no chat template; accepted: template 'plain'")


class BPETokenizer:
    """A tokenizer of the `tokenizers` library with what a model file says about special ids and chat."""

    def __init__(
        self, backend: Any, *, eos_id: int, pad_id: int, template: str | None = None, bos: str = "", eos: str = ""
    ):
        self.backend, self.eos_id, self.pad_id = backend, eos_id, pad_id
        self.template = template if isinstance(template, str) else None
        self.names = {"bos_token": bos, "eos_token": eos}
        self.lossy = type(backend.model).__name__ == "Unigram"
        added = backend.encode("", add_special_tokens=True).ids
        self.start: tuple[int, ...] = tuple(added[:1]) if bos and added[:1] == [backend.token_to_id(bos)] else ()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids])

    def beginning(self, text: str, n: int) -> str:
        """The part of a text that its first ``n`` tokens stand for, as it was written; for tokenizers that are
        ``lossy``: their tokens do not give back every space."""
        return text[: self.backend.encode(text, add_special_tokens=False).offsets[n - 1][1]] if n else ""

    def chat(self, messages: Sequence[Message]) -> str:
        """Rendered by Jinja in a sandbox: a template comes from a file and may not reach out of its strings."""
        if self.template is None:
            raise RequestError("this tokenizer has no chat template; accepted: template 'plain'")
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise RequestError("a chat template needs the package 'jinja2': pip install jinja2") from None
        try:
            template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=True, **self.names)
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None


def from_gguf(fields: Mapping[str, Any], where: str) -> BPETokenizer:
    """The tokenizer of a GGUF file's metadata: byte-level BPE ('gpt2') or SentencePiece's BPE ('llama'). Raises
    RequestError where it is of another kind or broken."""
    from tokenizers.processors import TemplateProcessing

    tokens, model = _strings(fields, "tokens", where), fields.get("tokenizer.ggml.model")
    eos = _id(fields, "eos", len(tokens), where)
    kinds = _numbers(fields, "token_type", len(tokens), where, [1] * len(tokens))
    pre = str(fields.get("tokenizer.ggml.pre"))
    if model not in ("llama", "gpt2") or (model == "gpt2" and pre not in byte_bpe.PRE):
        accepted = f"'llama', or 'gpt2' with {', '.join(byte_bpe.PRE)}"
        raise RequestError(f"{where}: tokenizer {model!r} with {pre!r}; accepted: {accepted}")
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    merges = _strings(fields, "merges", where) if model == "gpt2" else []
    scores = _numbers(fields, "scores", len(tokens), where) if model == "llama" else []
    bos = fields.get("tokenizer.ggml.bos_token_id")
    first = tokens[bos] if isinstance(bos, int) and 0 <= bos < len(tokens) else ""
    adds = fields.get("tokenizer.ggml.add_bos_token", model == "llama" or pre == "llama-bpe")
    try:
        if model == "gpt2":
            backend = byte_bpe.backend(tokens, merges, kinds, byte_bpe.PRE[pre])
        else:
            backend = spm.backend(tokens, scores, kinds, prefix=prefix)
        if first and adds:
            backend.post_processor = TemplateProcessing(single=[first, "$A"], special_tokens=[(first, bos)])
    except Exception as error:  # the Rust side raises plain Exception
        raise RequestError(f"{where}: the tokenizer's merges do not fit its vocabulary: {error}") from None
    return BPETokenizer(
        backend,
        eos_id=eos,
        pad_id=_id(fields, "padding", len(tokens), where, eos),
        template=fields.get("tokenizer.chat_template"),
        bos=first,
        eos=tokens[eos],
    )


def from_folder(folder: Path) -> BPETokenizer:
    """tokenizer.json, with the special tokens and template of tokenizer_config.json, of a Hugging Face model; where
    there is none, the spiece.model of a T5."""
    from tokenizers import Tokenizer as Backend

    file, pieces = folder / "tokenizer.json", folder / "spiece.model"
    if pieces.exists() and not file.exists():
        return _from_pieces(pieces)
    config = read_json(folder / "tokenizer_config.json")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise RequestError(f"{file}: not a tokenizer: {error}") from None
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    names = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    eos = backend.token_to_id(names["eos"])
    if eos is None:
        raise RequestError(f"{folder / 'tokenizer_config.json'}: eos_token {names['eos']!r} is not in the vocabulary")
    pad = backend.token_to_id(names["pad"])
    beside = folder / "chat_template.jinja"  # where transformers 5 writes it
    template = beside.read_text() if beside.exists() else config.get("chat_template")
    return BPETokenizer(
        backend, eos_id=eos, pad_id=eos if pad is None else pad, template=template, bos=names["bos"], eos=names["eos"]
    )


def _from_pieces(file: Path) -> BPETokenizer:
    beside = file.parent / "tokenizer_config.json"
    config = read_json(beside) if beside.exists() else {}
    sentinels = config.get("extra_ids", 100)
    if not isinstance(sentinels, int) or not 0 <= sentinels <= 10_000:
        raise RequestError(f"{beside}: extra_ids is {shown(sentinels)}; accepted: 0 to 10000")
    backend = unigram.backend(file, sentinels)
    eos, pad = (backend.token_to_id(name) for name in (unigram.EOS, unigram.PAD))
    if eos is None:
        raise RequestError(f"{file}: no piece {unigram.EOS!r}; accepted: the pieces of a T5")
    return BPETokenizer(backend, eos_id=eos, pad_id=eos if pad is None else pad, eos=unigram.EOS)


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _strings(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise RequestError(f"{where}: key 'tokenizer.ggml.{name}' is absent; accepted: a list of strings")
    return value


def _numbers(
    fields: Mapping[str, Any], name: str, size: int, where: str, default: list[int] | None = None
) -> Sequence[Any]:
    value = fields.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, list) or len(value) != size or not all(isinstance(v, (int, float)) for v in value):
        raise RequestError(f"{where}: key 'tokenizer.ggml.{name}' is absent or short; accepted: {size} numbers")
    return value


def _id(fields: Mapping[str, Any], name: str, size: int, where: str, default: int | None = None) -> int:
    value = fields.get(f"tokenizer.ggml.{name}_token_id", default)
    if not isinstance(value, int) or not 0 <= value < size:
        raise RequestError(f"{where}: {name}_token_id is {value!r}; accepted: 0 to {size - 1}")
    return value
