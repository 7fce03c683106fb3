"""The O-LoRA benchmark: fifteen text classification tasks in six orders, as stages and as evals.

Wang et al. 2023 (arXiv 2310.14152). Files: ``olora_benchmark/<task>/{train,test}.jsonl.gz`` and
``tasks.json`` in the data directory. Training reads only the train files, evaluation only the test files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.data.stage import Stage, instruct_source, subsample, target_table
from jaxcl.data.streams import STREAMS, StreamInfo
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "olora_benchmark"


def olora_stages(
    order: str,
    data_dir: str | Path | None,
    tokenizer: Tokenizer,
    *,
    window: int,
    template: str = "plain",
    rows: int | None = None,
    seed: int = 0,
    prefix: bool = False,
) -> list[Stage]:
    """The stages of ``order`` ('olora/order_1' .. 'olora/order_6'), each teaching the eval of its own name.

    rows: at most so many training rows per task, drawn by ``seed``; None: all. All stages have one number of
    targets per row, so a run needs one compilation. RequestError: unknown order, absent folder or file,
    malformed or duplicate rows, a target or instruction that does not fit into ``window``.
    """
    info, style = _order(order), Template(template, prefix)
    read = {task: subsample(_task_rows(task, "train", data_dir), rows, seed) for task in info.stages}
    k = max(len(ids) for r in read.values() for ids in target_table(r, style, tokenizer).values())
    return [
        Stage(task, instruct_source(task, records, tokenizer, window=window, k=k, template=style), (task,))
        for task, records in read.items()
    ]


def olora_evals(
    order: str,
    data_dir: str | Path | None,
    tokenizer: Tokenizer,
    *,
    window: int,
    template: str = "plain",
    rows: int | None = None,
    seed: int = 0,
    prefix: bool = False,
    batch_size: int = 16,
    by: str = "ranking",
) -> list[Eval]:
    """One eval per task of ``order``, over its test file. by: 'ranking' (accuracy of the best label) or
    'generation' (greedy exact match). rows: at most so many test rows per task, drawn by ``seed``; None: all.
    RequestError as in `olora_stages`."""
    from jaxcl.evaluate.exact_match import exact_match
    from jaxcl.evaluate.ranking import label_ranking

    kinds: dict[str, Callable[..., Eval]] = {"ranking": label_ranking, "generation": exact_match}
    if by not in kinds:
        raise unknown("kind of evaluation", by, kinds)
    style = Template(template, prefix)
    return [
        kinds[by](
            task,
            subsample(_task_rows(task, "test", data_dir), rows, seed),
            tokenizer,
            window=window,
            template=style,
            batch_size=batch_size,
        )
        for task in _order(order).stages
    ]


def _order(name: str) -> StreamInfo:
    known = {n: info for n, info in STREAMS.items() if n.startswith("olora/")}
    if name not in known:
        raise unknown("order", name, known)
    return known[name]


def _task_rows(task: str, split: str, data_dir: str | Path | None) -> list[dict[str, Any]]:
    """Rows of one split with the task's ``category``, which the reference's prefix names."""
    folder = data_folder(FOLDER, data_dir)
    path = folder / task / f"{split}.jsonl.gz"
    rows = read_rows(path, "instruct")
    for row in rows:
        if not row.get("labels"):
            raise RequestError(f"{path}: row {row['id']!r} has no labels; a classification task needs them")
    category = _category(folder / "tasks.json", task)
    return [row | {"category": category} for row in rows]


def _category(path: Path, task: str) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[task]["category"])
    except FileNotFoundError as error:
        raise RequestError(f"no data file {path}, which names the category of each task") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: expected {{task: {{'category': ...}}}} for {task!r} ({error})"
        ) from error
