"""Text that every Python carries: four kinds whose bytes differ enough that a small model forgets one for another.

    prose     the language reference, as `help("topics")` lists it
    code      source of the standard library
    names     names of Unicode characters
    charsets  tables of the one-byte encodings: byte, character, code point

Documents (a topic, a module, a Unicode block, an encoding) are dealt out whole, by a hash of their names: one in
eight is held out for tests, three in eight are pretraining text, the rest trains the stage. So no test text is a
neighbour of text that trained, and another Python version, whose documents differ a little, deals the same way.
"""

from __future__ import annotations

import encodings
import importlib
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxcl.errors import RequestError

LAST_NAMED = 0x2C00  # scripts and symbols; above begin long runs of numbered characters
LONGEST = 20_000  # characters of one document, so that no module or topic outweighs the others

Documents = dict[str, str]


class Text(NamedTuple):
    """Documents of one kind: for pretraining, for training the stage, for testing."""

    base: list[str]
    train: list[str]
    test: list[str]


def prose() -> Documents:
    """One document a topic of the language reference."""
    return dict(importlib.import_module("pydoc_data.topics").topics)


def code() -> Documents:
    """One document a public top-level module."""
    files = Path(os.__file__).parent.glob("[a-z]*.py")
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def names() -> Documents:
    """One document per 128 code points, a name a line."""
    blocks = {start: range(start, start + 128) for start in range(0, LAST_NAMED, 128)}
    return {f"{start:04x}": _lines(unicodedata.name(chr(c), "") for c in block) for start, block in blocks.items()}


def charsets() -> Documents:
    """One document an encoding: a line for each byte of its upper half that stands for a visible character."""

    def line(charset: str, byte: int) -> str:
        char = bytes([byte]).decode(charset, "ignore")
        return f"{charset} {byte:02x} {char} {ord(char):04x}" if char and char.isprintable() else ""

    files = Path(encodings.__file__).parent.glob("[a-z]*.py")
    tables = (file.stem for file in files if "\ndecoding_table = (" in file.read_text(encoding="utf-8"))
    return {name: _lines(line(name, byte) for byte in range(128, 256)) for name in tables}


KINDS: dict[str, Callable[[], Documents]] = {"prose": prose, "code": code, "names": names, "charsets": charsets}


def deal(documents: Documents) -> Text:
    """Of eight documents one to the tests, three to pretraining, four to the stage; in the order of their names."""
    hands: tuple[list[str], ...] = ([], [], [])
    for name, text in sorted(documents.items()):
        place = zlib.crc32(name.encode()) % 8
        if text.strip():
            hands[2 if place == 0 else 0 if place < 4 else 1].append(text.strip()[:LONGEST])
    return Text(*hands)


def excerpts(documents: Sequence[str], size: int, count: int) -> list[str]:
    """``count`` pieces of ``size`` bytes of UTF-8 (a character cut in two is left out), spread evenly over them all.

    Raises RequestError when there is too little text.
    """
    raw = [document.encode() for document in documents]
    pieces = [d[at : at + size] for d in raw for at in range(0, len(d) - size + 1, size)]
    if len(pieces) < count:
        raise RequestError(f"{count} rows of {size} bytes are asked for; accepted: up to {len(pieces)} of this text")
    return [pieces[i * len(pieces) // count].decode(errors="ignore") for i in range(count)]


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(filter(None, lines))
