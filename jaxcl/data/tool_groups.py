"""Dialogues with tools in groups that arrive one after another. Card refine-align/tool-lifelong.

Glaive: ``tool_use/glaive_toolcall/{train,test}``; ToolAlpaca: ``tool_use/toolalpaca/eval_simulated`` (``.jsonl.gz``).
The groups are our own: no continual benchmark of tools exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.jsonl import data_folder, read_rows

Row = dict[str, Any]
GROUPS = {
    "calculate": ("calculate",),
    "create": ("create", "generate"),
    "look_up": ("search", "get", "find", "fetch", "check", "track", "analyze"),
    "act": ("send", "convert", "play", "translate", "buy", "book"),
}
"""Glaive's tools by the first word of their names; another word: the last group."""
PLAIN = "no_tool"
TEST_SHARE = 0.4
"""Of ToolAlpaca's instructions for each interface: its file is for evaluation and has no training part."""


def glaive(split: str, data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """{group: dialogues} of `GROUPS`, by the first tool a dialogue has; `PLAIN`: those without any."""
    rows = read_rows(data_folder("tool_use", data_dir) / "glaive_toolcall" / f"{split}.jsonl.gz", "tool")
    out: dict[str, list[Row]] = {name: [] for name in (*GROUPS, PLAIN)}
    for row in rows:
        out[group_of(row)].append(row)
    return out


def group_of(dialogue: Row) -> str:
    """The group of a dialogue's first tool."""
    if not dialogue["tools"]:
        return PLAIN
    verb = dialogue["tools"][0]["name"].partition("_")[0]
    return next((name for name, verbs in GROUPS.items() if verb in verbs), list(GROUPS)[-1])


def toolalpaca(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """{interface: its instructions with golden calls}, in the file's order."""
    rows = read_rows(data_folder("tool_use", data_dir) / "toolalpaca" / "eval_simulated.jsonl.gz", "tool")
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row["api"], []).append(row)
    return out


def held_out(rows: Sequence[Row], split: str) -> list[Row]:
    """The 'train' or the 'test' part of rows that come without splits: 40% are held out, drawn once and for all."""
    held = set(np.random.default_rng(0).permutation(len(rows))[: round(TEST_SHARE * len(rows))].tolist())
    return [row for i, row in enumerate(rows) if (i in held) == (split == "test")]
