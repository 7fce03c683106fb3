"""Named entities for streams: sentences cut into disjoint slices, and labels of other stages' types taken away.

Rows of the ``ner`` schema (tokens with BIO tags): ``ner/<domain>/{train,dev,test}.jsonl.gz`` in the data directory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.jsonl import data_folder, read_rows

FOLDER = "ner"
Row = dict[str, Any]


def ner_rows(domain: str, split: str, data_dir: str | Path | None = None) -> list[Row]:
    """The rows of a domain's split, checked. RequestError: no such file, malformed rows."""
    return read_rows(data_folder(FOLDER, data_dir) / domain / f"{split}.jsonl.gz", "ner")


def types_of(rows: Sequence[Row]) -> list[str]:
    """All entity types that occur, sorted."""
    return sorted({tag[2:] for row in rows for tag in row["tags"] if tag != "O"})


def only(row: Row, types: Collection[str]) -> Row:
    """The row in which entities of other types are no entities: their tags are O."""
    return row | {"tags": [tag if tag[2:] in types else "O" for tag in row["tags"]]}


def sliced(rows: Sequence[Row], groups: Mapping[str, Collection[str]], seed: int) -> dict[str, list[Row]]:
    """{stage: its slice of the rows}, disjoint, all rows used; groups: {stage: its types}.

    Sentences are taken in an order drawn by ``seed``, those that fewer stages can use first. Each goes to the stage
    with the fewest sentences so far among those whose types it has; one without any entity of the stages' types comes
    last and goes to the stage with the fewest of all. A slice keeps the rows' order, and their tags as they are.
    """
    found = [set(types_of([row])) for row in rows]
    wanting = [[stage for stage, types in groups.items() if own & set(types)] for own in found]
    drawn = np.random.default_rng([seed, 14]).permutation(len(rows))
    slices: dict[str, list[int]] = {stage: [] for stage in groups}
    for i in sorted(drawn, key=lambda i: len(wanting[i]) or len(groups) + 1):  # stable: ties stay as drawn
        slices[min(wanting[i] or groups, key=lambda stage: len(slices[stage]))].append(int(i))
    return {stage: [rows[i] for i in sorted(chosen)] for stage, chosen in slices.items()}
