"""Data sets of the Hugging Face hub as a table, from the cache of ``datasets``, or from a folder on disk.

A folder was written by ``save_to_disk``, or holds CSV, JSON, Parquet or text files, one or more a split. Rows stay in
mapped Arrow files. Nothing is downloaded but by `prepare`, and no code that comes with a data set is run.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from jaxcl.data.columns import Numbered, Table
from jaxcl.errors import RequestError, needs_extra, unknown


def open_table(name: str) -> Table:
    """name: 'OWNER/NAME' or 'OWNER/NAME/CONFIG' of the hub, or a folder. RequestError: not in the cache (the line says
    what to run), a folder that is no data set, the package is absent."""
    datasets = _library()
    found = _folder(datasets, Path(name)) if Path(name).is_dir() else _cached(datasets, name)
    splits = dict(found) if isinstance(found, dict) else {"all": found}
    features = next(iter(splits.values())).features
    classes = {c: tuple(f.names) for c, f in features.items() if isinstance(f, datasets.ClassLabel)}

    def split_of(split: str) -> Any:
        if split not in splits:
            raise unknown("split", split, splits, where=f"hf:{name}")
        return splits[split]

    def rows(split: str, start: int, stop: int | None) -> Numbered:
        whole = split_of(split)
        return enumerate(whole.select(range(start, len(whole) if stop is None else stop)), start)

    return Table(f"hf:{name}", tuple(splits), tuple(features), classes, lambda s: len(split_of(s)), rows)


def prepare(name: str) -> str:
    """Downloads the data set into the cache of ``datasets``; returns the folder. RequestError: it cannot."""
    datasets = _library()
    repo, config = _parts(name)
    try:
        builder = datasets.load_dataset_builder(repo, config)
        builder.download_and_prepare()
    except Exception as error:  # network, a config that it lacks, files it cannot read
        raise RequestError(f"hf:{name} cannot be downloaded: {_line(error)}") from error
    return str(builder.cache_dir)


def _cached(datasets: Any, name: str) -> Any:
    """What an earlier `prepare` or ``load_dataset`` left in the cache; the hub is not asked."""
    repo, config = _parts(name)
    cache = importlib.import_module("datasets.packaged_modules.cache.cache")
    try:
        where = {"repo_id": repo, "dataset_name": repo.rpartition("/")[2], "config_name": config}
        return cache.Cache(**where, version="auto", hash="auto").as_dataset()
    except Exception as error:
        more = _line(error, last=True)
        raise RequestError(f"hf:{name} is not in the cache ({more}); run: jaxcl fetch hf:{name}") from error


def _folder(datasets: Any, folder: Path) -> Any:
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    except Exception as error:
        raise RequestError(f"hf:{folder} is no data set that 'datasets' can read: {_line(error)}") from error


def _parts(name: str) -> tuple[str, str | None]:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise RequestError(f"hf:{name}: accepted: hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, or hf: and an existing folder")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _line(error: Exception, *, last: bool = False) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (", ".join(lines[-2:]) if last else lines[0])[:300]


def _library() -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise needs_extra("datasets", "hf") from None
    datasets.disable_progress_bars()
    return datasets
