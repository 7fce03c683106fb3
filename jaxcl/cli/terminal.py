"""How tables look in a terminal and in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 160  # a pipe has no width; wide enough that names are not folded


def console() -> Console:
    """Standard output; names with brackets are text, not markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(markup=False, highlight=False, width=width)


def plain_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """A table of texts with one row a mapping; None is shown as a dash. The first column is never folded."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(c)) for c in columns))
    return table


def cell(value: Any) -> str:
    """One value as text: four decimals for numbers, a dash for None."""
    if value is None or value == "":
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
