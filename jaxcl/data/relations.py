"""Relations between two marked entities of a sentence: rows of the ``re`` schema as questions with answers.

FewRel (Han et al. 2018, arXiv 1810.10147): ``relation_extraction/fewrel/{train_*,test}.jsonl.gz`` and
``relations.json`` (names, and clusters of ten that make eight tasks) in the data directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.errors import RequestError

FOLDER = "relation_extraction/fewrel"
QUESTION = "What is the relation of the head to the tail?\n"
Row = dict[str, Any]


def relation_rows(split: str, data_dir: str | Path | None = None) -> list[Row]:
    """``instruct`` rows of ``train_union``, ``train_fewshot5``, ``train_fewshot10`` or ``test``; their targets are the
    relations' names, and they list no options. RequestError: no such file, malformed rows."""
    rows = read_rows(data_folder(FOLDER, data_dir) / f"{split}.jsonl.gz", "re")
    return [asked(row) for row in rows]


def asked(row: Row) -> Row:
    """An ``re`` row as a question: the sentence with its head and tail marked."""
    shown = {"task": row["task"], "id": row["id"], "instruction": QUESTION, "input": marked(row)}
    return shown | {"target": row["relation"]}


def marked(row: Row) -> str:
    """The sentence with ``[head] ... [/head]`` and ``[tail] ... [/tail]`` around the two entities.

    RequestError where the two overlap.
    """
    (a, b), (c, d) = row["head"]["span"], row["tail"]["span"]
    if max(a, c) < min(b, d):
        raise RequestError(f"row {row['id']!r}: head {[a, b]} and tail {[c, d]} overlap; accepted: two apart")
    before = {a: "[head]", c: "[tail]"}
    after = {b - 1: "[/head]", d - 1: "[/tail]"}
    words = [(before.get(i), token, after.get(i)) for i, token in enumerate(row["tokens"])]
    return " ".join(part for word in words for part in word if part is not None)


def clusters(data_dir: str | Path | None = None) -> list[list[str]]:
    """The names of the relations in eight groups of ten. RequestError: a file that says something else."""
    path = data_folder(FOLDER, data_dir) / "relations.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [str(one["name"]) for one in found["relations"]]
        groups = [[str(name) for name in group] for group in found["task_clusters"]]
    except FileNotFoundError as error:
        raise RequestError(f"no data file {path}, which names the relations and their groups") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: expected relations with names, and task_clusters ({type(error).__name__}: {error})"
        ) from error
    if sorted(name for group in groups for name in group) != sorted(set(names)) or list(map(len, groups)) != [10] * 8:
        raise RequestError(f"{path}: task_clusters are not eight groups of ten of the relations' names, each once")
    return groups
