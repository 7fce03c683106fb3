"""Dialogues with tools as questions and answers: what a model reads before each of its turns, and what it should write.

A call is written as one JSON object, ``{"name": ..., "arguments": {...}}``. Text that a model wrote is data: it is
parsed as JSON, bounded in size and depth, and never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.metrics.tools import Call

MAX_TEXT, MAX_DEPTH, MAX_STARTS = 20_000, 20, 64
"""Characters looked at, nesting of a call, and braces at which one may begin."""
INSTRUCTION = 'Answer the user, or call a tool with one JSON object {"name": ..., "arguments": {...}}.\nTools:\n'
_SAID = {"user": "User", "assistant": "Assistant", "system": "System", "tool_call": "Call", "tool_result": "Result"}
_NO_TOOL = {"components"}  # ToolAlpaca lists this part of its API descriptions among the functions


def turns(row: Mapping[str, Any], task: str, history: int | None = None) -> list[dict[str, Any]]:
    """A row of the ``tool`` schema as ``instruct`` rows, one for each turn of the model.

    ``calls`` holds what is wanted there, [{"name", "arguments"}], empty where a reply in words is; of a ToolAlpaca row,
    whose later calls need the results of earlier ones, the first call. Its arguments are None where the source left a
    blank (``${...}``), and only the name counts. ``tools``: names of the tools that are offered. history: at most so
    many messages before a turn (default: all).
    """
    if row.get("messages") is None:
        return [_first_call(row, task)]
    offered = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in row["tools"]) or "none\n"
    found = []
    for at, message in enumerate(row["messages"]):
        if message["role"] not in ("assistant", "tool_call") or not message["content"].strip():
            continue
        before = row["messages"][:at] if history is None else row["messages"][max(at - history, 0) : at]
        said = "\n".join(f"{_SAID[m['role']]}: {m['content']}" for m in before)
        calls = [json.loads(message["content"])] if message["role"] == "tool_call" else []
        made = {"task": task, "id": f"{row['id']}/{at}", "instruction": INSTRUCTION + offered, "input": said}
        target = written(calls[0]) if calls else message["content"]
        found.append(made | {"target": target, "calls": calls, "tools": [tool["name"] for tool in row["tools"]]})
    return found


def written(call: Mapping[str, Any]) -> str:
    """A call as the text that a model should write."""
    return json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)


def read_calls(text: str) -> list[Call]:
    """The calls in a written text, in order; arguments may be JSON inside a text. A tool's description, which a
    model may repeat, has parameters and is no call."""
    text, found, at = text[:MAX_TEXT], [], 0
    for _ in range(MAX_STARTS):
        at = text.find("{", at)
        if at < 0:
            break
        value, end = _object(text, at)
        call = _call(value)
        if call is not None:
            found.append(call)
        at = end if call is not None else at + 1
    return found


def normalised(value: Any) -> Any:
    """A JSON value as arguments are compared: white space at the ends of texts is dropped, a text that is a number in
    JSON's spelling is that number. Case, order in lists and everything else count."""
    if isinstance(value, str):
        text = value.strip()
        number, end = _parsed(text)
        return number if end == len(text) and isinstance(number, int | float) and not isinstance(number, bool) else text
    if isinstance(value, Mapping):
        return {key: normalised(part) for key, part in value.items()}
    return [normalised(part) for part in value] if isinstance(value, list | tuple) else value


def _first_call(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    gold = row["golden_calls"][0]
    arguments = _parsed(gold["Action_Input"])[0]
    call = {
        "name": gold["Action"].removeprefix("[Optional]"),
        "arguments": arguments if isinstance(arguments, dict) else None,
    }
    target = written(call) if call["arguments"] is not None else json.dumps({"name": call["name"]})
    tools = [name for name in row.get("functions") or () if name not in _NO_TOOL]
    return {
        "task": task,
        "id": row["id"],
        "instruction": INSTRUCTION + row["tools_description"].rstrip() + "\n",
        "input": f"User: {row['instruction']}",
        "target": target,
        "calls": [call],
        "tools": tools,
        "api": row["api"],
    }


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments.strip())[0]
    return Call(value["name"].strip(), arguments) if isinstance(arguments, dict) else None


def _object(text: str, at: int) -> tuple[Any, int]:
    """(the JSON value that begins here, where it ends); (None, -1) where none does, or it is nested too deep."""
    value, end = _parsed(text, at)
    return (value, end) if value is not None and _depth(value) <= MAX_DEPTH else (None, -1)


def _parsed(text: str, at: int = 0) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return None, -1


def _depth(value: Any) -> int:
    deepest, parts = 0, [(value, 1)]
    while parts:
        part, level = parts.pop()
        deepest = max(deepest, level)
        inside: Sequence[Any] = ()
        if isinstance(part, dict):
            inside = list(part.values())
        elif isinstance(part, list):
            inside = part
        parts += [(one, level + 1) for one in inside]
    return deepest


def _refused(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_refused)
