"""Files: written whole or not at all, read up to a limit, and listed while they change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxcl.core.bucket import remote
from jaxcl.errors import RequestError

HALF = ".tmp"
"""What a file's name ends in until it is whole. One process works in a run directory (`jaxcl.core.lock`), so what a
kill left of it is written over the next time."""


def write_atomic(path: Path, text: str) -> None:
    """Writes a small file so that a kill leaves the old one or the new one, never half of one; an OSError, too."""
    if remote(path):  # an object is there whole or not at all
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(path.name + HALF)
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file, in pieces: a device or a pipe has no size to ask for. Raises RequestError above ``most`` bytes."""
    pieces, size = [], 0
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise RequestError(f"{path} is too large; accepted: at most {most} bytes")
    return b"".join(pieces)


def walk(root: Path) -> Iterator[Path]:
    """Everything under a folder; what another thread takes away meanwhile is passed over (`Path.rglob` raises)."""
    for at, folders, names in os.walk(root):
        yield from (Path(at, name) for name in (*folders, *names))
