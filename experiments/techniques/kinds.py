"""Nine kinds of text that every Python carries: eight to learn one after another, and prose that no stage teaches.

    code        source of the standard library
    names       names of Unicode characters
    charsets    tables of the one-byte encodings: byte, character, code point
    bytecode    what `dis` shows of the library's modules
    trees       the syntax trees of its modules, as `ast.dump` writes them
    properties  a table of Unicode: code point, category, direction, width, decomposition
    cases       cased characters with their upper, lower and folded forms
    entities    names of HTML's characters
    prose       the language reference, for general ability

Documents are dealt to pretraining, stage and tests as in the demo. Nothing is executed: modules are compiled and read.
"""

from __future__ import annotations

import ast
import dis
import html.entities
import io
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

from jaxcl.experiment_files import load

text = load("demo").text
Documents = dict[str, str]
BLOCK = 64  # code points of a document
LARGEST = 30_000  # bytes of a module that is read


def modules() -> dict[str, str]:
    """{name: source} of the standard library's public modules that are not too long."""
    files = sorted(Path(os.__file__).parent.glob("[a-z]*.py"))
    return {f.stem: f.read_text(encoding="utf-8") for f in files if f.stat().st_size < LARGEST}


def bytecode() -> Documents:
    """One document a module."""
    found = {}
    for name, source in modules().items():
        out = io.StringIO()
        dis.dis(compile(source, name, "exec"), file=out, depth=1)
        found[name] = "\n".join(" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip())
    return found


def trees() -> Documents:
    """One document a module."""
    return {name: ast.dump(ast.parse(source)) for name, source in modules().items()}


def properties() -> Documents:
    """A line for each named character."""

    def line(c: str) -> str:
        kinds = (unicodedata.category(c), unicodedata.bidirectional(c), unicodedata.east_asian_width(c))
        return " ".join((f"{ord(c):04x}", *kinds, unicodedata.decomposition(c))).strip()

    found = blocks(lambda c: unicodedata.name(c, "") != "")
    return {name: "\n".join(map(line, block)) for name, block in found.items()}


def cases() -> Documents:
    """A line for each character that has another case."""
    found = blocks(lambda c: len({c.upper(), c.lower(), c.casefold()}) > 1)
    return {
        name: "\n".join(f"{c} upper {c.upper()} lower {c.lower()} fold {c.casefold()}" for c in block)
        for name, block in found.items()
    }


def entities() -> Documents:
    """One document for each first letter."""
    found: dict[str, list[str]] = {}
    for name, chars in sorted(html.entities.html5.items()):
        points = " ".join(f"U+{ord(c):04X}" for c in chars)
        found.setdefault(name[:1], []).append(f"&{name} stands for {chars} {points}")
    return {start: "\n".join(lines) for start, lines in found.items()}


def blocks(wanted: Callable[[str], bool]) -> dict[str, list[str]]:
    """{first code point of a block: its wanted characters} below 0x3000 and in the blocks of cased scripts above."""
    chars = [chr(c) for c in (*range(0x3000), *range(0xA640, 0xAC00), *range(0x10400, 0x10600)) if wanted(chr(c))]
    found: dict[str, list[str]] = {}
    for c in chars:
        found.setdefault(f"{ord(c) // BLOCK * BLOCK:04x}", []).append(c)
    return found


KINDS: dict[str, Callable[[], Documents]] = {
    "code": text.code,
    "names": text.names,
    "charsets": text.charsets,
    "bytecode": bytecode,
    "trees": trees,
    "properties": properties,
    "cases": cases,
    "entities": entities,
}
GENERAL = "prose"
ALL: dict[str, Callable[[], Documents]] = {**KINDS, GENERAL: text.prose}
