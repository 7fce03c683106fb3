"""The O-LoRA benchmark: fifteen text classification tasks in six orders, as stages and as evals.

Wang et al. 2023 (arXiv 2310.14152). Files: ``olora_benchmark/<task>/{train,test}.jsonl.gz`` and
``tasks.json`` in the data directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.data.folder import folder_evals, folder_stages, read_split
from jaxcl.data.jsonl import data_folder
from jaxcl.data.olora_orders import ORDERS
from jaxcl.data.stage import Stage
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "olora_benchmark"


def olora_stages(
    order: str | Sequence[str],
    data_dir: str | Path | None,
    tokenizer: Tokenizer,
    *,
    window: int,
    template: str = "plain",
    rows: int | None = None,
    seed: int = 0,
    prefix: bool = False,
) -> list[Stage]:
    """The stages of ``order`` ('olora/order_1' .. 'olora/order_6', or tasks by name); the rest as in `folder_stages`.

    template: 'plain' or 'chat'; prefix: the reference's ``Task:``/``Dataset:`` lines. RequestError: an unknown
    order, and what `folder_stages` refuses.
    """
    names, style = _tasks(order), Template(template, prefix)
    folder = data_folder(FOLDER, data_dir)
    return folder_stages(folder, names, tokenizer, window=window, template=style, rows=rows, seed=seed, read=_read)


def olora_evals(
    order: str | Sequence[str],
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
    """One eval per task of ``order``, over its test file; see `olora_stages` and `folder_evals`."""
    names, style = _tasks(order), Template(template, prefix)
    return folder_evals(
        data_folder(FOLDER, data_dir),
        names,
        tokenizer,
        window=window,
        template=style,
        rows=rows,
        seed=seed,
        batch_size=batch_size,
        by=by,
        read=_read,
    )


def _tasks(order: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(order, str):
        if order not in ORDERS:
            raise unknown("order", order, ORDERS)
        return ORDERS[order]
    tasks = ORDERS["olora/order_6"]
    for task in order:
        if task not in tasks:
            raise unknown("task", task, tasks)
    return tuple(order)


def _read(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    """Rows of one split with the task's ``category``, which the reference's prefix names."""
    rows = read_split(folder, task, split)
    for row in rows:
        if not row.get("labels"):
            raise RequestError(
                f"{folder / task}: row {row['id']!r} of {split} has no labels; a classification task needs them"
            )
    category = _category(folder / "tasks.json", task)
    return [row | {"category": category} for row in rows]


def _category(path: Path, task: str) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[task]["category"])
    except FileNotFoundError as error:
        raise RequestError(f"no data file {path}, which names the category of each task") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: expected {{task: {{'category': ...}}}} for {task!r} ({error})") from error
