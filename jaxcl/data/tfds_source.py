"""TensorFlow Datasets as a table, read from ArrayRecord files through ``tfds.data_source``: no TensorFlow.

Where they lie: $TFDS_DATA_DIR, else TFDS's own folder. Nothing is downloaded but by `prepare`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.columns import Numbered, Table
from jaxcl.errors import RequestError, nearest

_REGISTERS = ("text", "question_answering", "summarization", "translate", "text_simplification")


def open_table(name: str, data_dir: str | Path | None = None) -> Table:
    """name: as TFDS has it, 'glue/sst2' or 'imdb_reviews:1.0.0'. RequestError: no such data set or split, one that is
    not prepared here (the line says what to run), one prepared in a format that only TensorFlow reads."""
    builder = _builder(name, data_dir)
    features = builder.info.features
    classes = {c: tuple(f.names) for c, f in features.items() if type(f).__name__ == "ClassLabel"}

    @functools.cache
    def source(split: str) -> Sequence[Any]:
        # unprepared data has no splits in its info, yet TFDS's mock reads it: so it is tried, and explained afterwards
        if builder.info.splits and split not in builder.info.splits:
            raise RequestError(f"tfds:{name} has no split {split!r}; {nearest(split, builder.info.splits)}")
        try:
            return builder.as_data_source(split)
        except Exception as error:  # AssertionError, NotImplementedError, ValueError: as TFDS's version has it
            raise _refused(name, builder, error) from error

    def rows(split: str, start: int, stop: int | None) -> Numbered:
        found = source(split)
        numbers = range(start, len(found) if stop is None else stop)
        return ((i, {column: _plain(value) for column, value in found[i].items()}) for i in numbers)

    base = name.partition(":")[0]
    return Table(f"tfds:{base}", tuple(builder.info.splits), tuple(features), classes, lambda s: len(source(s)), rows)


def prepare(name: str, data_dir: str | Path | None = None) -> str:
    """Downloads the data set and writes it as ArrayRecord files; returns where they are. RequestError: it cannot."""
    builder = _builder(name, data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except Exception as error:  # network, disk, a builder that needs TensorFlow or Beam
        raise RequestError(f"tfds:{name} cannot be prepared in {builder.data_path}: {_line(error)}") from error
    return str(builder.data_path)


def _builder(name: str, data_dir: str | Path | None, **options: Any) -> Any:
    tfds = _library()
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        return tfds.builder(name, data_dir=place, try_gcs=False, **options)
    except Exception as error:  # no such data set, config or version, a name of another form
        raise RequestError(f"no data set 'tfds:{name}'; {_instead(tfds, name, error)}") from error


def _instead(tfds: Any, name: str, error: Exception) -> str:
    """The nearest data sets, or the nearest configs where there is such a data set."""
    base, _, config = name.partition(":")[0].partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        return nearest(base, known)
    with contextlib.suppress(Exception):  # one that is on disk only has no class to ask
        configs = list(tfds.builder_cls(base).builder_configs)
        if config and config not in configs:
            return nearest(f"{base}/{config}", [f"{base}/{c}" for c in configs])
    return _line(error)


def _refused(name: str, builder: Any, error: Exception) -> RequestError:
    if not builder.is_prepared():
        return RequestError(f"tfds:{name} is not prepared in {builder.data_path}; run: jaxcl fetch tfds:{name}")
    if isinstance(error, NotImplementedError):
        return RequestError(
            f"tfds:{name} lies in {builder.data_path} as {builder.info.file_format.value}, which only TensorFlow "
            f"reads; point TFDS_DATA_DIR elsewhere and run: jaxcl fetch tfds:{name}"
        )
    return RequestError(f"tfds:{name} in {builder.data_path} cannot be read: {_line(error)}")


def _plain(value: Any) -> Any:
    """Bytes as text, numpy numbers as Python's; the rest as it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.item() if getattr(value, "shape", None) == () else value


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _library() -> Any:
    """TFDS with all its text data sets; those in older modules are known only once these are imported."""
    tfds = importlib.import_module("tensorflow_datasets")
    for module in _REGISTERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{module}")
    tfds.disable_progress_bar()
    return tfds
