"""Predictions kept per item: predictions/<eval id, / as __>.row<k>.jsonl.gz; row 0 is before any training."""

from __future__ import annotations

import functools
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Eval
from jaxcl.metrics.pooling import parts_of

MAX_LINE = 1 << 20  # bytes of one record after decompression: a small file may unpack to anything


class ItemScores(NamedTuple):
    """ids: texts, sorted; parts f64[rows, n, P]: what item j adds in row k, NaN where there is no file. Their sums over
    items, given to the eval's pool, make a cell of the matrix; without a pool they are (score, 1)."""

    ids: tuple[str, ...]
    parts: np.ndarray


def predictions_path(run: Path, eval_id: str, row: int) -> Path:
    """Where the predictions of an eval are kept after stage ``row`` (0: before training)."""
    return run / "predictions" / f"{eval_id.replace('/', '__')}.row{row}.jsonl.gz"


def read_items(run: Path, e: Eval, rows: int) -> ItemScores | None:
    """What the items of an eval add to it in rows 0..rows-1, or None where no row has a file.

    Raises RequestError on a damaged or malformed file, and when two rows hold different items.
    """
    files = {k: p for k in range(rows) if (p := predictions_path(run, e.id, k)).is_file()}
    stats = [p.stat() for p in files.values()]
    stamps = tuple((s.st_mtime_ns, s.st_size) for s in stats)
    return _items(run, e, rows, tuple(files), stamps) if files else None


@functools.lru_cache(maxsize=512)
def _items(run: Path, e: Eval, rows: int, there: tuple[int, ...], stamps: tuple[tuple[int, int], ...]) -> ItemScores:
    """Reading is most of the work of a bootstrap, and a report resamples the same files several times. ``stamps``: when
    they were written and how large they are; other files are read anew."""
    found = {k: _read(predictions_path(run, e.id, k), e) for k in there}
    first = min(found)
    ids = tuple(sorted(found[first]))
    width = len(found[first][ids[0]])
    parts = np.full((rows, len(ids), width), np.nan)
    for k, row in found.items():
        where = predictions_path(run, e.id, k)
        if row.keys() != found[first].keys():
            odd = min(row.keys() ^ found[first].keys())
            raise RequestError(f"{where}: item {odd!r} is not in row {first} and row {k}; accepted: one set")
        for i in ids:
            if len(row[i]) != width:
                raise RequestError(f"{where}: item {i!r} has {len(row[i])} parts; accepted: {width}, as the first")
        parts[k] = [row[i] for i in ids]
    parts.flags.writeable = False  # shared by all who ask
    return ItemScores(ids, parts)


def _read(path: Path, e: Eval) -> dict[str, list[float]]:
    """{id: parts} of one file; never more than n records."""
    out: dict[str, list[float]] = {}
    try:
        with gzip.open(path, "rb") as f:
            while line := f.readline(MAX_LINE + 1):
                where = f"{path}, line {len(out) + 1}"
                if len(line) > MAX_LINE or len(out) == e.n:
                    raise RequestError(f"{where}: too much; accepted: {e.n} records below {MAX_LINE} bytes")
                key, value = _record(line, where, e.pool)
                if key in out:
                    raise RequestError(f"{where}: id {key!r} occurs twice; accepted: every item once")
                out[key] = value
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot be decompressed ({error}); accepted: a whole gzip file") from None
    if len(out) != e.n:
        raise RequestError(f"{path} has {len(out)} records; accepted: {e.n}, as the matrix says of this eval")
    return out


def _record(line: bytes, where: str, pool: str | None) -> tuple[str, list[float]]:
    what = "score" if pool is None else "parts"
    try:
        record = json.loads(line)
        key, values = str(record["id"]), parts_of(record, pool)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise RequestError(f"{where}: no prediction; accepted: object with id, prediction, {what}") from None
    if not values or not all(map(math.isfinite, values)):
        raise RequestError(f"{where}: {what} is {record[what]}; accepted: finite numbers")
    return key, values
