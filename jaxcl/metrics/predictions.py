"""Predictions kept per item: predictions/<eval id, / as __>.row<k>.jsonl.gz; row 0 is before any training."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import Eval

MAX_LINE = 1 << 20  # bytes of one record after decompression: a small file may unpack to anything


class ItemScores(NamedTuple):
    """ids: texts, sorted; scores f64[rows, n]: row k of item j, NaN rows where there is no file."""

    ids: tuple[str, ...]
    scores: np.ndarray


def predictions_path(run: Path, eval_id: str, row: int) -> Path:
    """Where the predictions of an eval are kept after stage ``row`` (0: before training)."""
    return run / "predictions" / f"{eval_id.replace('/', '__')}.row{row}.jsonl.gz"


def read_items(run: Path, e: Eval, rows: int) -> ItemScores | None:
    """Item scores of an eval for rows 0..rows-1, or None where no row has a file.

    Raises RequestError on a damaged or malformed file, and when two rows hold different items.
    """
    found = {k: _read(p, e.n) for k in range(rows) if (p := predictions_path(run, e.id, k)).is_file()}
    if not found:
        return None
    first = min(found)
    ids = tuple(sorted(found[first]))
    scores = np.full((rows, len(ids)), np.nan)
    for k, row in found.items():
        if row.keys() != found[first].keys():
            odd = min(row.keys() ^ found[first].keys())
            where = predictions_path(run, e.id, k)
            raise RequestError(f"{where}: item {odd!r} is not in row {first} and row {k}; accepted: one set")
        scores[k] = [row[i] for i in ids]
    return ItemScores(ids, scores)


def _read(path: Path, n: int) -> dict[str, float]:
    """{id: score} of one file; never more than n records."""
    out: dict[str, float] = {}
    try:
        with gzip.open(path, "rb") as f:
            while line := f.readline(MAX_LINE + 1):
                where = f"{path}, line {len(out) + 1}"
                if len(line) > MAX_LINE or len(out) == n:
                    raise RequestError(f"{where}: too much; accepted: {n} records below {MAX_LINE} bytes")
                key, value = _record(line, where)
                if key in out:
                    raise RequestError(f"{where}: id {key!r} occurs twice; accepted: every item once")
                out[key] = value
    except (OSError, EOFError, zlib.error) as e:
        raise RequestError(f"{path}: cannot be decompressed ({e}); accepted: a whole gzip file") from None
    if len(out) != n:
        raise RequestError(f"{path} has {len(out)} records; accepted: {n}, as the matrix says of this eval")
    return out


def _record(line: bytes, where: str) -> tuple[str, float]:
    try:
        record = json.loads(line)
        key, value = str(record["id"]), float(record["score"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise RequestError(f"{where}: no prediction; accepted: object with id, prediction, score") from None
    if not math.isfinite(value):
        raise RequestError(f"{where}: score is {value}; accepted: a finite number")
    return key, value
