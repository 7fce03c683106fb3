"""Which column of a data set is what: from a table's rows to rows of the ``instruct`` and ``text`` schemas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.jsonl import check_row
from jaxcl.errors import RequestError, unknown

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]


class Table(NamedTuple):
    """An opened data set. name: as the user wrote it. splits: their names, () where they cannot be known.
    columns: their names. classes: {column of class numbers: names of the classes}. size(split) -> rows.
    rows(split, start, stop) -> (number in the split, plain Python row), one at a time. shaped: rows follow a schema."""

    name: str
    splits: Sequence[str]
    columns: Sequence[str]
    classes: Mapping[str, Sequence[str]]
    size: Callable[[str], int]
    rows: Callable[[str, int, int | None], Numbered]
    shaped: bool = False


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a table's rows are read.

    text: the column that is the input (the document, under the ``text`` schema), or several: then each is a line
    ``name: value``, as T5 wrote the GLUE tasks. label: the column of answers, class numbers or strings. labels: the
    answers that may occur, by class number; default: the names that the data set has for its classes; None for free
    answers. instruction: the question, put before the input of every row. task: default the data set's name. id:
    a column of unique ids; default: split and row number.
    """

    text: str | tuple[str, ...]
    label: str | None = None
    labels: tuple[str, ...] | None = None
    instruction: str = ""
    task: str | None = None
    id: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


_TOPIC = "What is this news about?\n"
_MOOD = "What is the sentiment of this {}?\n"
KNOWN: dict[str, Columns] = {
    "tfds:ag_news_subset": Columns(("title", "description"), "label", instruction=_TOPIC),
    "tfds:glue/sst2": Columns("sentence", "label", instruction=_MOOD.format("sentence")),
    "tfds:imdb_reviews": Columns("text", "label", instruction=_MOOD.format("review")),
    "tfds:imdb_reviews/plain_text": Columns("text", "label", instruction=_MOOD.format("review")),
    "hf:fancyzhx/ag_news": Columns("text", "label", instruction=_TOPIC),
    "hf:nyu-mll/glue/sst2": Columns("sentence", "label", instruction=_MOOD.format("sentence")),
    "hf:stanfordnlp/imdb": Columns("text", "label", instruction=_MOOD.format("review")),
}
"""Data sets whose columns need not be said."""


def shape(table: Table, schema: str, columns: Columns | None) -> Callable[[Row, str, int], Row]:
    """(row, split, number) -> the row in ``schema``: 'instruct' (text, label, instruction) or 'text' (text alone).

    columns: default `KNOWN`, and for text a column named ``text``. RequestError: a table whose columns nobody named,
    columns that it lacks, class numbers without names; when a row is read: a text that is none, a row without label.
    """
    if columns is None:
        columns = KNOWN.get(table.name) or (Columns("text") if schema == "text" and "text" in table.columns else None)
    if columns is None:
        wanted = "Columns(text=...)" if schema == "text" else "Columns(text=..., label=...)"
        raise RequestError(f"{table.name}: say which column is what: {wanted}; it has {_list(table.columns)}")
    if schema == "instruct" and columns.label is None:
        raise RequestError(f"{table.name}: Columns(label=...) is needed for answers; it has {_list(table.columns)}")
    label = (columns.label,) if columns.label and schema == "instruct" else ()
    for name in (*columns.texts, *label, *((columns.id,) if columns.id else ())):
        if table.columns and name not in table.columns:
            raise unknown("column", name, table.columns, where=table.name)
    names = _labels(table, columns) if label else None
    return lambda row, split, number: _shaped(row, f"{split}-{number}", table.name, schema, columns, names)


def _shaped(
    row: Row, number: str, table: str, schema: str, columns: Columns, names: tuple[str, ...] | None
) -> Row:
    where = f"{table}, row {number}"
    made: Row = {"id": str(_of(row, columns.id, where)) if columns.id else number}
    parts = [(name, _text(_of(row, name, where), name, where)) for name in columns.texts]
    body = parts[0][1] if len(parts) == 1 else "".join(f"{name}: {value}\n" for name, value in parts)
    if schema == "text":
        made["text"] = body
    else:
        assert columns.label is not None
        target = _answer(_of(row, columns.label, where), names, columns.label, where)
        made |= {"task": columns.task or task_name(table), "instruction": columns.instruction}
        made |= {"input": body, "target": target} | ({"labels": list(names)} if names else {})
    return check_row(made, schema, where)


def task_name(name: str) -> str:
    """The last part of a data set's name: 'sst2' for 'tfds:glue/sst2', 'rows' for 'my/rows.jsonl.gz'."""
    return name.rpartition(":")[2].rstrip("/").rpartition("/")[2].partition(".jsonl")[0]


def _labels(table: Table, columns: Columns) -> tuple[str, ...] | None:
    own = table.classes.get(columns.label or "")
    if columns.labels is not None and own and len(columns.labels) != len(own):
        raise RequestError(
            f"{table.name}: {len(columns.labels)} labels are given for the {len(own)} classes {_list(own)}"
        )
    names = columns.labels or own
    return tuple(names) if names else None


def _of(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise unknown("column", column, row, where=where)
    return row[column]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: column {column!r} holds {str(value)[:60]!r}, which is no text")
    return value


def _answer(value: Any, names: tuple[str, ...] | None, column: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if names is None:
            raise RequestError(f"{where}: column {column!r} holds the number {value}; name the classes by labels=(...)")
        if not 0 <= value < len(names):
            raise RequestError(
                f"{where}: label {value} is no class (0 to {len(names) - 1}); a split without labels cannot be used"
            )
        return names[value]
    answer = _text(value, column, where)
    if names is not None and answer not in names:
        raise unknown("label", answer, names, where=where)
    return answer


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "columns that are not known before it is read"
