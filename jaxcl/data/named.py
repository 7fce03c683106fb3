"""Data by name, wherever it lies: one function for all experiments.

    tfds:NAME[/CONFIG][:VERSION][:SPLIT]    TensorFlow Datasets      tfds:glue/sst2:validation
    hf:OWNER/NAME[/CONFIG][:SPLIT]          Hugging Face datasets    hf:fancyzhx/ag_news:train[:1000]
    PATH[:SPLIT]                            JSON Lines               text_domains/legal, my/rows.jsonl.gz:all[:90%]

A path is a file, a folder of ``<split>.jsonl[.gz]``, or such a folder of the data directory. Splits are written as in
TFDS (see `splits`). Last parts of a name with ``=`` choose rows by a column: ``text_languages/genesis/lang=de`` or,
both ends included, ``text_dated/peps/date=2000..2005``; splits are slices of the rows chosen.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.data import hf_source, local_source, tfds_source
from jaxcl.data.columns import Columns, Numbered, Row, Table, shape
from jaxcl.data.jsonl import REQUIRED
from jaxcl.data.splits import Span, shared, spans
from jaxcl.errors import RequestError, unknown

_NAME = re.compile(r"(?:(tfds|hf):)?([^:\[\]]+)(?::([\d*]+\.[\d*]+\.[\d*]+))?(?::(.+))?")


Place = tuple[str, int]
"""Split and number of a row: the same however it is reached."""


class Name(NamedTuple):
    """A name, taken apart. scheme: 'tfds', 'hf' or '' for a path. chosen: (column, value or lowest, highest or None for
    this very value) of each filter."""

    scheme: str
    path: str
    version: str | None
    split: str | None
    chosen: tuple[tuple[str, str, str | None], ...]


def load_rows(
    name: str,
    *,
    split: str | None = None,
    schema: str = "instruct",
    columns: Columns | None = None,
    data_dir: str | Path | None = None,
) -> list[Row]:
    """All rows that ``name`` means, checked; see `iter_rows`. RequestError where there are none."""
    rows = list(iter_rows(name, split=split, schema=schema, columns=columns, data_dir=data_dir))
    if not rows:
        raise RequestError(f"{name}: no rows; a stage needs at least one")
    return rows


def iter_rows(
    name: str,
    *,
    split: str | None = None,
    schema: str = "instruct",
    columns: Columns | None = None,
    data_dir: str | Path | None = None,
) -> Iterator[Row]:
    """The rows one after another, in the data set's order; nothing is held that was read.

    split: where the name has none; default: 'train', or the only split. schema: 'instruct' or 'text'. columns: what a
    column means (default: see `columns.KNOWN`); JSON Lines on disk follow the schema already where it is None.
    data_dir: the data directory for paths (default $JAXCL_DATA). RequestError at once: an unknown name, split or
    column, data that is not here; while reading: a row that does not fit the schema.
    """
    table = _open(name, schema, columns, data_dir)
    return (row for _, row in _read(table, _spans(table, name, split), schema, columns))


def train_and_test(
    data: Mapping[str, str],
    train: str,
    test: str,
    *,
    schema: str = "instruct",
    columns: Columns | None = None,
    data_dir: str | Path | None = None,
) -> dict[str, tuple[Iterator[Row], list[Row]]]:
    """{stage: (rows to train on, rows to test on)} of the data sets {stage: name}; names have no split of their own.

    RequestError: two splits that share a row; when it is read, a training row that another stage tests on (two stages
    may choose from one data set); no test rows; and as in `load_rows`.
    """
    learned: dict[str, Iterator[Row]] = {}
    tests: dict[str, list[Row]] = {}
    owner: dict[tuple[str, Place], str] = {}
    for stage, name in data.items():
        if (own := parse(name).split) is not None:
            raise RequestError(f"{name}: it has the split {own!r}; train ({train!r}) and test ({test!r}) say which")
        table = _open(name, schema, columns, data_dir)
        trained_on, held_out = _spans(table, name, train), _spans(table, name, test)
        if base := shared(trained_on, held_out):
            raise RequestError(f"{name}: {train!r} and {test!r} share rows of {base!r}; no test row may be trained on")
        placed = list(_read(table, held_out, schema, columns))
        if not placed:
            raise RequestError(f"{name}: no rows in {test!r}; an eval needs at least one")
        owner |= {(table.name, place): stage for place, _ in placed}
        tests[stage] = [row for _, row in placed]
        learned[stage] = _no_tests(_read(table, trained_on, schema, columns), table.name, stage, owner)
    return {stage: (rows, tests[stage]) for stage, rows in learned.items()}


def _no_tests(
    rows: Iterator[tuple[Place, Row]], table: str, stage: str, owner: Mapping[tuple[str, Place], str]
) -> Iterator[Row]:
    for place, row in rows:
        if (other := owner.get((table, place))) is not None:
            raise RequestError(
                f"stage {stage!r}: row {row['id']!r} of {table} is a test row of stage {other!r}; "
                "choose rows or splits that have none in common"
            )
        yield row


def parse(name: str) -> Name:
    """The parts of a name; RequestError where it has another form."""
    match = _NAME.fullmatch(name)
    if match is None or (match[3] and match[1] != "tfds"):
        raise RequestError(
            f"data name {name!r}: accepted: tfds:NAME[/CONFIG][:VERSION][:SPLIT], hf:OWNER/NAME[/CONFIG][:SPLIT], "
            "PATH[:SPLIT]"
        )
    scheme, path, version, split = match.groups()
    parts = path.split("/")
    chosen: list[tuple[str, str, str | None]] = []
    while len(parts) > 1 and "=" in parts[-1]:
        column, _, value = parts.pop().partition("=")
        low, dots, high = value.partition("..")
        chosen.append((column, low, high if dots else None))
    return Name(scheme or "", "/".join(parts), version, split, tuple(chosen))


def prepare(name: str) -> str:
    """Downloads what a ``tfds:`` or ``hf:`` name means; returns the folder it lies in afterwards."""
    found = parse(name)
    if found.scheme == "tfds":
        return tfds_source.prepare(found.path + (f":{found.version}" if found.version else ""))
    if found.scheme == "hf":
        return hf_source.prepare(found.path)
    raise RequestError(f"{name!r} lies on disk; accepted: tfds:NAME or hf:OWNER/NAME")


def _open(name: str, schema: str, columns: Columns | None, data_dir: str | Path | None) -> Table:
    if schema not in REQUIRED:
        raise unknown("schema", schema, REQUIRED)
    found = parse(name)
    if found.scheme == "tfds":
        table = tfds_source.open_table(found.path + (f":{found.version}" if found.version else ""))
    elif found.scheme == "hf":
        table = hf_source.open_table(found.path)
    else:
        table = local_source.open_table(found.path, data_dir, schema if columns is None else None)
    return _chosen(table, found) if found.chosen else table


def _spans(table: Table, name: str, split: str | None) -> list[Span]:
    own = parse(name).split
    if own is not None and split is not None:
        raise RequestError(f"{name}: the name has a split already; accepted: one of it and {split!r}")
    default = table.splits[0] if len(table.splits) == 1 else "train"
    return spans(own or split or default, table.size, table.name)


def _read(
    table: Table, where: list[Span], schema: str, columns: Columns | None
) -> Iterator[tuple[Place, Row]]:
    shaped = None if table.shaped else shape(table, schema, columns)
    parts = [(span, table.rows(*span)) for span in where]  # a split that is not there is an error now, not later

    def rows() -> Iterator[tuple[Place, Row]]:
        for span, part in parts:
            for number, row in part:
                yield (span.base, number), row if shaped is None else shaped(row, span.base, number)

    return rows()


def _chosen(table: Table, name: Name) -> Table:
    """The table of the rows that the name's filters let through; its splits are sliced after them."""

    def keeps(row: Row) -> bool:
        for column, low, high in name.chosen:
            if column not in row:
                raise unknown("column", column, row, where=f"{table.name}/{column}=...")
            if not _between(row[column], low, high):
                return False
        return True

    def kept(split: str) -> Numbered:
        return (pair for pair in table.rows(split, 0, None) if keeps(pair[1]))

    return table._replace(
        size=lambda split: sum(1 for _ in kept(split)),
        rows=lambda split, start, stop: itertools.islice(kept(split), start, stop),
    )


def _between(value: Any, low: str, high: str | None) -> bool:
    """low <= value <= high; text is compared as far as the bound goes, so that 2005 holds 2005-12-31."""
    if high is None:
        return str(value) == low
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return (not low or value >= float(low)) and (not high or value <= float(high))
    except ValueError:
        return False
    text = str(value)
    return text[: len(low)] >= low and text[: len(high)] <= high
