"""Documents of a stage: one data set or several joined by `` + ``, their text in whichever field it stands."""

from __future__ import annotations

from pathlib import Path

from jaxcl.data.columns import Columns, Row
from jaxcl.data.named import load_rows
from jaxcl.errors import RequestError

FIELDS = {"olora_benchmark": "input", "trace": "input", "financial_phrasebank": "input"}
"""Folders whose rows are questions with answers: which of their fields is text to learn from."""


def documents(name: str, split: str, data_dir: str | Path | None = None) -> list[Row]:
    """``text`` rows of a data name, in its order, or of several, one after another. Rows of `FIELDS` become their text.

    RequestError: no rows, data that is not here, an id that two of the data sets have, and as in `named.load_rows`.
    """
    found: list[Row] = []
    for part in name.split(" + "):
        field = FIELDS.get(part.partition("/")[0])
        columns = Columns(field, id="id") if field else None
        found += load_rows(part, split=split, schema="text", columns=columns, data_dir=data_dir)
    ids = [row["id"] for row in found]
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise RequestError(f"{name}: id {twice!r} occurs in two of its parts; accepted: ids that differ")
    return [row for row in found if row["text"].strip()]
