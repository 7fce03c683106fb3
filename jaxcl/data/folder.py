"""Streams of stages from a folder: ``<stage>/train.jsonl[.gz]`` to learn, ``<stage>/test.jsonl[.gz]`` to measure.

Rows are of the ``instruct`` schema. Stages read only the train files, evals only the test files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.data.jsonl import read_rows
from jaxcl.data.stage import Stage, instruct_source, subsample, target_table
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]
Read = Callable[[Path, str, str], list[Row]]


def read_split(folder: Path, stage: str, split: str) -> list[Row]:
    """Rows of ``<folder>/<stage>/<split>.jsonl``, or ``.jsonl.gz`` where that is what there is."""
    plain = folder / stage / f"{split}.jsonl"
    return read_rows(plain if plain.exists() else plain.with_suffix(".jsonl.gz"), "instruct")


def folder_stages(
    folder: str | Path,
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    rows: int | None = None,
    seed: int = 0,
    read: Read = read_split,
) -> list[Stage]:
    """One stage per name, in order, each teaching the eval of its own name.

    rows: at most so many training rows per stage, drawn by ``seed``; None: all. All stages have one number of
    targets per row, so a run needs one compilation. RequestError: no folder or file, malformed or duplicate
    rows, a target or an instruction that does not fit into ``window``.
    """
    read_in = {name: subsample(read(_folder(folder), name, "train"), rows, seed) for name in names}
    return instruct_stages(read_in, tokenizer, window=window, template=template)


def folder_evals(
    folder: str | Path,
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    rows: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    by: str = "ranking",
    read: Read = read_split,
) -> list[Eval]:
    """One eval per name over its test file. by: 'ranking' (accuracy of the best label) or 'generation' (greedy
    exact match). rows: at most so many test rows per eval, drawn by ``seed``. RequestError: as `folder_stages`."""
    read_in = {name: subsample(read(_folder(folder), name, "test"), rows, seed) for name in names}
    return instruct_evals(read_in, tokenizer, window=window, template=template, batch_size=batch_size, by=by)


def instruct_stages(
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    label: Callable[[Row], str] | None = None,
    evals: Mapping[str, Sequence[str]] | None = None,
) -> list[Stage]:
    """One stage per name over ``instruct`` rows, each teaching the eval of its name; see `folder_stages`.

    label: see `stage.instruct_source`. evals: {stage: ids of the evals it teaches}, where they are others.
    """
    template = template or Template()
    tables = [target_table(records, template, tokenizer) for records in rows.values()]
    k = max((len(ids) for table in tables for ids in table.values()), default=0)
    return [
        Stage(
            name,
            instruct_source(name, records, tokenizer, window=window, k=k, template=template, label=label),
            tuple(evals[name]) if evals else (name,),
        )
        for name, records in rows.items()
    ]


def instruct_evals(
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    batch_size: int = 16,
    by: str = "ranking",
) -> list[Eval]:
    """One eval per name over ``instruct`` rows; see `folder_evals`."""
    from jaxcl.evaluate.generation import exact_match
    from jaxcl.evaluate.ranking import label_ranking

    kinds: dict[str, Callable[..., Eval]] = {"ranking": label_ranking, "generation": exact_match}
    if by not in kinds:
        raise unknown("kind of evaluation", by, kinds)
    shared = {"window": window, "template": template, "batch_size": batch_size}
    return [kinds[by](name, records, tokenizer, **shared) for name, records in rows.items()]


def _folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise RequestError(f"no data folder {folder}; it must hold <stage>/train.jsonl for every stage")
    return Path(folder)
