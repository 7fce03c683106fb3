"""Rows of the instruction-tuning sets: SuperNI's tasks (SAPT, SSR), TRACE's, T0's templates, and general ones.

Folders of the data directory: ``superni/<task>``, ``trace/<task>``, ``t0_templates/<template>.jsonl.gz``,
``self_instruct``, ``general_instruction/alpaca``. Options are part of these prompts already, so a row's ``labels`` are
left out and the template adds none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.folder import read_split
from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.data.leaks import unrepeated

Row = dict[str, Any]
END = "<|endoftext|>"
TEST_SHARE = 0.25
"""Of a T0 template's rows: their file has no splits."""
_MARKS = ("Answer:", "Stance:", "态度：", "Summary:", "Simplification:")


def superni(task: str, split: str, data_dir: str | Path | None = None) -> list[Row]:
    """A SuperNI task: its definition, then the input; ``target`` is the first reference."""
    rows = read_split(data_folder("superni", data_dir), task, split)
    return [_bare(row) | {"instruction": f"Definition: {row['instruction']}\n\nInput: "} for row in rows]


def trace(task: str, split: str, data_dir: str | Path | None = None, *, repeat: bool = False) -> list[Row]:
    """A TRACE task. The mark that ends its inputs (``Answer:``, ``Stance:``, ...) is left to the template. repeat: a
    row as often as the published file has it (``count``), its copies numbered in their ids."""
    rows = [_unmarked(_bare(row)) for row in read_split(data_folder("trace", data_dir), task, split)]
    if not repeat:
        return rows
    return [row | {"id": f"{row['id']}#{n}" if n else row["id"]} for row in rows for n in range(row.get("count", 1))]


def t0(template: str, split: str, data_dir: str | Path | None = None) -> list[Row]:
    """A T0 template's 'train' or 'test' rows: the file has no splits, so a quarter, drawn once and for all, is held
    out, and training rows that repeat a held-out prompt are dropped. The end mark in the answers is taken off."""
    rows = read_rows(data_folder("t0_templates", data_dir) / f"{template}.jsonl.gz", "instruct")
    rows = [_bare(row) | {"target": row["target"].removesuffix(END).rstrip()} for row in rows]
    held = set(np.random.default_rng(0).permutation(len(rows))[: round(TEST_SHARE * len(rows))].tolist())
    tests = [row for i, row in enumerate(rows) if i in held]
    if split == "test":
        return tests
    return unrepeated((r for i, r in enumerate(rows) if i not in held), map(question, tests), question)


def general(name: str, data_dir: str | Path | None = None) -> list[Row]:
    """Test rows of a general instruction set: 'self_instruct' (175 human-written seed tasks), 'alpaca' or 'lima'."""
    if name == "self_instruct":
        rows = read_rows(data_folder("self_instruct", data_dir) / "seed_tasks.jsonl.gz", "instruct")
    elif name == "alpaca":
        rows = read_split(data_folder("general_instruction", data_dir), "alpaca", "test")
    else:
        rows = read_split(data_folder("trace", data_dir), "Lima", "eval")
    return [_bare(row) | {"instruction": row["instruction"] + "\n" * bool(row["instruction"])} for row in rows]


def question(row: Row) -> str:
    """What a row asks: two rows that ask the same are one item, whatever they answer."""
    return row["instruction"] + row["input"]


def _bare(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "labels"}


def _unmarked(row: Row) -> Row:
    text = row["input"].rstrip()
    for mark in _MARKS:
        text = text.removesuffix(mark)
    return row | {"input": text.rstrip()}
