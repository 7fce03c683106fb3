"""JSON Lines on disk as a table: one file (its split is called ``all``), or a folder with a file for each split."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

from jaxcl.data.columns import Numbered, Table
from jaxcl.data.jsonl import count_rows, iter_rows
from jaxcl.errors import RequestError, nearest, unknown

ENDINGS = (".jsonl", ".jsonl.gz")
SCHEMES = ("tfds", "hf")


def open_table(name: str, data_dir: str | Path | None, schema: str | None) -> Table:
    """name: a file or folder, or a folder of the data directory (``data_dir``, else $JAXCL_DATA).

    schema: what the rows follow, None for any JSON objects. RequestError: nothing there, no file of rows in it.
    """
    files = _files(name, data_dir)

    def file(split: str) -> Path:
        if split not in files:
            raise unknown("split", split, files, where=name)
        return files[split]

    def rows(split: str, start: int, stop: int | None) -> Numbered:
        return itertools.islice(enumerate(iter_rows(file(split), schema)), start, stop)

    return Table(name, sorted(files), (), {}, lambda split: count_rows(file(split)), rows, shaped=schema is not None)


def _files(name: str, data_dir: str | Path | None) -> dict[str, Path]:
    """{split: file}."""
    place = _place(name, data_dir)
    if place.is_file():
        return {"all": place}
    found = {f.name[: -len(e)]: f for e in ENDINGS for f in sorted(place.iterdir()) if f.name.endswith(e)}
    if not found:
        inside = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
        raise RequestError(f"{place} has no train.jsonl or train.jsonl.gz for a split; it holds: {inside}")
    return found


def _place(name: str, data_dir: str | Path | None) -> Path:
    if Path(name).is_dir() or (Path(name).is_file() and name.endswith(ENDINGS)):
        return Path(name)
    root = data_dir if data_dir is not None else os.environ.get("JAXCL_DATA")
    if root and not Path(name).is_absolute():
        for place in (Path(root) / name, *(Path(root) / (name + e) for e in ENDINGS)):
            if place.is_dir() or (place.is_file() and place.name.endswith(ENDINGS)):
                return place
    raise RequestError(f"no data set {name!r}{_instead(name, Path(root) if root else None)}")


def _instead(name: str, root: Path | None) -> str:
    """What could have been meant: another scheme, the names beside it, or that no data directory is known."""
    if close := difflib.get_close_matches(name, SCHEMES, cutoff=0.7):
        return f"; did you mean '{close[0]}:...'?"
    if root is None or not root.is_dir():
        where = "no data directory" if root is None else f"no folder {root}"
        return f": {where}; --data or JAXCL_DATA must name the one that holds {name}/, or write tfds:NAME or hf:NAME"
    parts = Path(name).parts
    depth = next((n for n in range(len(parts) - 1, 0, -1) if root.joinpath(*parts[:n]).is_dir()), 0)
    beside = root.joinpath(*parts[:depth])
    known = ["/".join([*parts[:depth], p.name]) for p in beside.iterdir() if p.is_dir() or p.name.endswith(ENDINGS)]
    return f" in {root}; {nearest('/'.join(parts[: depth + 1]), known)}"
