"""Reads a GGUF header with suspicion: every length, count and offset is checked against the file's size first.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package trusts what a file says
about itself (an array that claims 2^60 entries is looped over), so the walk is ours; its tables of types and its
dequantisation are the package's.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LEAST = {kind: struct.calcsize(code) for kind, code in SCALARS.items()} | {STRING: 8}


class Tensor(NamedTuple):
    """shape as numpy has it (slowest first); kind: number of the quantisation type; start, size: bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class Header(NamedTuple):
    """A GGUF file's metadata {key: value} and tensors {name: Tensor}; all of them lie inside the file."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """The header of a GGUF file, version 2 or 3, little endian. Raises RequestError, in one line, where the file
    is absent, is no GGUF file, is cut short, repeats a name, or says anything that does not fit into it."""
    try:
        with open(path, "rb") as file:
            if not path.stat().st_size:
                raise RequestError(f"{path}: the file is empty; accepted: a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(data, path).header()
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as GGUF: {error}") from None


class _Walk:
    """A cursor that never leaves the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def wrong(self, what: str) -> RequestError:
        return RequestError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.wrong(f"{size} bytes announced, {len(self.data) - self.at} left in the file")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.wrong(f"a string that is not UTF-8, {raw[:20]!r}") from None

    def count(self, what: str, least: int) -> int:
        number = self.scalar("Q")
        if number * least > len(self.data) - self.at:
            raise self.wrong(f"{number} {what} announced, but only {len(self.data) - self.at} bytes are left")
        return number

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.wrong(f"value type {kind}; accepted: 0 to 12")
        inner = self.scalar("I")
        if inner not in LEAST:
            raise self.wrong(f"array of type {inner}; accepted: numbers and strings")
        number = self.count("array entries", LEAST[inner])
        if inner == STRING:
            return [self.text() for _ in range(number)]
        return list(struct.unpack(f"<{number}{SCALARS[inner]}", self.take(number * LEAST[inner])))

    def header(self) -> Header:
        if self.take(4) != b"GGUF":
            raise RequestError(f"{self.path}: not a GGUF file (its first four bytes are not 'GGUF')")
        version = self.scalar("I")
        if version not in (2, 3):
            raise self.wrong(f"version {version}; accepted: 2, 3")
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        if tensors * 24 + keys * 13 > len(self.data):
            raise self.wrong(f"{tensors} tensors and {keys} keys announced in a file of {len(self.data)} bytes")
        fields: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if name in fields:
                raise self.wrong(f"key {name!r} is there twice")
            fields[name] = self.value(self.scalar("I"))
        infos = [self.tensor() for _ in range(tensors)]
        return Header(fields, self.placed(infos, fields.get("general.alignment", 32)))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.text(), self.scalar("I")
        if not 1 <= rank <= 4:
            raise self.wrong(f"tensor {name!r} has {rank} dimensions; accepted: 1 to 4")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, Tensor]:
        """Tensors by name, with offsets from the start of the file; none leaves it or lies on another."""
        from gguf.constants import GGML_QUANT_SIZES

        if not isinstance(alignment, int) or alignment < 1:
            raise self.wrong(f"alignment {alignment!r}; accepted: a whole number above 0")
        base, out = -(-self.at // alignment) * alignment, {}
        sizes = {int(kind): pair for kind, pair in GGML_QUANT_SIZES.items()}
        for name, shape, kind, offset in infos:
            if name in out:
                raise self.wrong(f"tensor {name!r} is there twice")
            if kind not in sizes:
                raise self.wrong(f"tensor {name!r} has type {kind}; accepted: {sorted(sizes)}")
            block, width = sizes[kind]
            if min(shape) < 1 or shape[-1] % block or offset % alignment:
                raise self.wrong(f"tensor {name!r} of type {kind} has shape {list(shape)} at offset {offset}")
            size = math.prod(shape) // block * width
            if base + offset + size > len(self.data):
                raise RequestError(
                    f"{self.path}: tensor {name!r} {list(shape)} ends at byte {base + offset + size}, "
                    f"but the file has {len(self.data)}: truncated or altered"
                )
            out[name] = Tensor(shape, kind, base + offset, size)
        ordered = sorted(out.items(), key=lambda item: item[1].start)
        for (first, a), (second, b) in itertools.pairwise(ordered):
            if a.start + a.size > b.start:
                raise self.wrong(f"tensors {first!r} and {second!r} lie on each other")
        return out
