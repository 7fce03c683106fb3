"""A generated part of a hand-written file, between two comments that name it."""

from __future__ import annotations

from pathlib import Path

from jaxcl.core.files import write_atomic
from jaxcl.errors import RequestError


def fill(file: Path, name: str, text: str) -> None:
    """Puts ``text`` between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a file; all else stays as it is.

    RequestError where the two do not stand there once each, in this order; the file is then as it was.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = file.read_text(encoding="utf-8")
    before, _, rest = whole.partition(begin)
    _, found, after = rest.partition(end)
    if not found or whole.count(begin) != 1 or whole.count(end) != 1:
        raise RequestError(f"{file} has no one place for the table; accepted: a line {begin} and, below it, {end}")
    write_atomic(file, f"{before}{begin}\n{text}\n{end}{after}")
