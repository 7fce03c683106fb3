"""What the builders of streams share: data that is absent, test rows that stand in training data, shares of rows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Settings, StreamInfo

if TYPE_CHECKING:
    from jaxcl.core.types import Budget

Row = dict[str, Any]
Parts = Mapping[str, Sequence[Row]]
"""{stage: its rows}."""


def present(info: StreamInfo, settings: Settings) -> None:
    """RequestError, naming the folder and the public source, where data of a stream is not in the data directory."""
    root = settings.data_dir if settings.data_dir is not None else os.environ.get("JAXCL_DATA")
    source = f"; stream {info.name!r}, public source: {', '.join(info.public) or 'none'}"
    for name in (part for data in info.data for part in data.split(" + ")):
        folder = re.split(r":|/\w+=", name)[0]  # without a split and without filters
        if not root:
            raise RequestError(
                f"no data directory: --data or JAXCL_DATA must name the folder that holds {folder}/{source}"
            )
        if not (Path(root) / folder).exists():
            raise RequestError(
                f"no folder {Path(root) / folder}; --data or JAXCL_DATA must name the one that holds {folder}/{source}"
            )


def plain(text: str) -> str:
    """Case, punctuation and white space do not make two texts different."""
    return " ".join(re.findall(r"\w+", text.lower()))


def cleaned(train: Parts, test: Parts, text: Callable[[Row], str]) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """(training rows without those that repeat a test row of any stage, notes on how many were dropped).

    Public benchmarks leak here and there; rows are the same where `plain` makes their ``text`` equal.
    """
    tested = {plain(text(row)) for rows in test.values() for row in rows} - {""}
    kept = {stage: [row for row in rows if plain(text(row)) not in tested] for stage, rows in train.items()}
    dropped = {stage: len(train[stage]) - len(rows) for stage, rows in kept.items() if len(rows) < len(train[stage])}
    return kept, {"training rows dropped that repeat a test row": dropped} if dropped else {}


def examples(count: int) -> Budget:
    """So many rows of past stages may be held; NOTHING where that is none."""
    from jaxcl.core.types import NOTHING, Budget

    return Budget(examples=count) if count else NOTHING


def number(settings: Settings, name: str, default: float, low: float, high: float) -> float:
    """A numeric option between two bounds, both included. RequestError otherwise."""
    value = settings.option(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"option {name} is {value!r}; accepted: a number from {low} to {high}")
    return value


def whole(settings: Settings, name: str, default: int) -> int:
    """An option that counts. RequestError where it is no whole number of at least 0."""
    value = settings.option(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"option {name} is {value!r}; accepted: a whole number of at least 0")
    return value
