"""Dialogues with tools as rows: what comes next is a call of a tool or plain text. Card refine-align/tool-lifelong.

Glaive: ``tool_use/glaive_toolcall/{train,test}``; ToolAlpaca: ``tool_use/toolalpaca/eval_simulated`` (``.jsonl.gz``).
A call is written as JSON, ``{"name": ..., "arguments": {...}}``. The groups are our own: no continual benchmark exists.
"""

from __future__ import annotations

import json
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
_SAID = {"user": "User", "assistant": "Assistant", "tool_call": "Call", "tool_result": "Result", "system": "System"}
TEST_SHARE = 0.4


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


def turns(dialogue: Row, *, documented: bool = False) -> list[Row]:
    """An ``instruct`` row for everything the model says: ``input`` is the dialogue so far, ``target`` the call or the
    text, ``call`` the parsed call or None. documented: the dialogue's own tools are described in the prompt; else
    what tools there are must be known from training."""
    tools = "".join(json.dumps(tool, sort_keys=True) + "\n" for tool in dialogue["tools"]) if documented else ""
    out, said = [], ""
    for n, message in enumerate(dialogue["messages"]):
        if message["role"] in ("assistant", "tool_call"):
            call = written(json.loads(message["content"])) if message["role"] == "tool_call" else None
            target = message["content"] if call is None else json.dumps(call)
            if target.strip():
                row = {"id": f"{dialogue['id']}/{n}", "task": "tools", "instruction": tools, "input": said.rstrip()}
                out.append(row | {"target": target.strip(), "call": call})
        said += f"{_SAID[message['role']]}: {message['content']}\n"
    return out


def written(call: Row) -> Row:
    """A call with its two fields alone, in their order."""
    return {"name": call["name"], "arguments": call["arguments"]}


def toolalpaca(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """{interface: its instructions with golden calls}, in the file's order."""
    rows = read_rows(data_folder("tool_use", data_dir) / "toolalpaca" / "eval_simulated.jsonl.gz", "tool")
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row["api"], []).append(row)
    return out


def first_calls(instructions: Sequence[Row], *, documented: bool = False) -> list[Row]:
    """An ``instruct`` row for each instruction: its first golden call is the answer (the next ones need its result). A
    call whose arguments are no JSON object has none that could be compared, and gives no row."""
    out = []
    for one in instructions:
        first = one["golden_calls"][0]
        arguments = _object(first["Action_Input"])
        if arguments is not None:
            call = {"name": first["Action"], "arguments": arguments}
            text = {"instruction": one["tools_description"] + "\n" if documented else "", "input": one["instruction"]}
            out.append({"id": one["id"], "task": one["api"], **text, "target": json.dumps(call), "call": call})
    return out


def halved(rows: Sequence[Row], split: str) -> list[Row]:
    """The 'train' or the 'test' part of rows that come without splits: 40% are held out, drawn once and for all."""
    held = set(np.random.default_rng(0).permutation(len(rows))[: round(TEST_SHARE * len(rows))].tolist())
    return [row for i, row in enumerate(rows) if (i in held) == (split == "test")]


def _object(text: str) -> Row | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
