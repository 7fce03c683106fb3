"""What a table of types cannot say of a row: fields inside fields, and fields that must agree with each other.

A check takes a row whose fields have the types of its schema, and says what is wrong with it; None: nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.errors import nearest

Row = Mapping[str, Any]
ROLES = ("user", "assistant", "tool_call", "tool_result", "system")


def ner(row: Row) -> str | None:
    """One BIO tag a token; an I- continues the entity before it."""
    tokens, tags = row["tokens"], row["tags"]
    if len(tokens) != len(tags):
        return f"field 'tags' has {len(tags)} entries for {len(tokens)} tokens; accepted: one tag a token"
    before = "O"
    for at, tag in enumerate(tags):
        if tag != "O" and (tag[:2] not in ("B-", "I-") or not tag[2:]):
            return f"field 'tags'[{at}] is {tag!r}; accepted: 'O', 'B-type' or 'I-type'"
        if tag[0] == "I" and before[2:] != tag[2:]:
            return f"field 'tags'[{at}] is {tag!r} after {before!r}; accepted: {'B' + tag[1:]!r} where an entity begins"
        before = tag
    return None


def re(row: Row) -> str | None:
    """Both entities with their text and where they stand, [start, end) in tokens."""
    for field in ("head", "tail"):
        entity, length = row[field], len(row["tokens"])
        if not isinstance(entity.get("text"), str):
            return f"field {field!r} has no 'text'; accepted: an object with text and span"
        span = entity.get("span")
        if not (_list_of(span, int) and len(span) == 2 and 0 <= span[0] < span[1] <= length):
            return f"field {field!r} has the span {span}; accepted: [start, end) within {length} tokens"
    return None


def translation(row: Row) -> str | None:
    """No language may be empty."""
    empty = [name for name in ("en", "de", "fr") if not row[name].strip()]
    return f"field {empty[0]!r} is empty; a translation needs its text" if empty else None


def tool(row: Row) -> str | None:
    """A dialogue with tools, or an instruction with the calls that serve it."""
    if row.get("messages") is None:
        need = ("api", "instruction", "tools_description", "golden_calls")
        absent = [name for name in need if row.get(name) is None]
        if absent:
            return f"field {absent[0]!r} is missing; accepted: tools and messages, or {', '.join(need)}"
        return _first(_golden(call, at) for at, call in enumerate(row["golden_calls"]))
    if row.get("tools") is None:
        return f"field 'tools' is missing; {nearest('tools', row)}"
    for at, one in enumerate(row["tools"]):
        if not (isinstance(one, dict) and isinstance(one.get("name"), str) and one["name"]):
            return f"field 'tools'[{at}] has no name; accepted: an object with name, description, parameters"
    if not row["messages"]:
        return "field 'messages' is empty; a dialogue needs its messages"
    return _first(_message(message, at) for at, message in enumerate(row["messages"]))


def retrieval(row: Row) -> str | None:
    """A document has a text, a query has the ids of the documents that answer it."""
    if (row.get("text") is None) == (row.get("query") is None):
        return "neither or both of 'text' and 'query'; accepted: a document (title, text) or a query (query, relevant)"
    if row.get("query") is None:
        return None
    if row.get("relevant") is None:
        return f"field 'relevant' is missing; {nearest('relevant', row)}"
    for doc, grade in (row.get("grades") or {}).items():
        if doc not in row["relevant"]:
            return f"field 'grades' names {doc!r}, which is not in 'relevant'; {nearest(doc, row['relevant'])}"
        if not isinstance(grade, int) or isinstance(grade, bool):
            return f"field 'grades'[{doc!r}] is {grade!r}; accepted: an integer"
    return None


def mcq(row: Row) -> str | None:
    """Two choices or more, none empty, and the index of the right one."""
    if not all(row["choices"]):
        return "field 'choices' holds an empty text; accepted: what may answer the question"
    return _index(row)


def probe(row: Row) -> str | None:
    """Answers with text; where there are choices, the index of the right one among them (wrong ones may be empty)."""
    if not all(row["answers"]):
        return "field 'answers' holds an empty text; accepted: what continues the prompt"
    if row.get("choices") is None:
        return None
    if row.get("answer") is None:
        return f"field 'answer' is missing; {nearest('answer', row)}"
    return _index(row)


def preference(row: Row) -> str | None:
    """Two answers, both with text, that are not the same."""
    empty = next((side for side in ("chosen", "rejected") if not row[side].strip()), None)
    if empty:
        return f"field {empty!r} is empty; accepted: an answer to the prompt"
    if row["chosen"] == row["rejected"]:
        return "field 'rejected' is the same as 'chosen'; accepted: another answer"
    return None


CHECKS: dict[str, Callable[[Row], str | None]] = {
    f.__name__: f for f in (ner, re, translation, mcq, probe, preference, tool, retrieval)
}


def _index(row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if len(choices) < 2:
        return f"field 'choices' has {len(choices)} entries; accepted: two or more"
    if not 0 <= answer < len(choices):
        return f"field 'answer' is {answer}; accepted: 0 to {len(choices) - 1}, an index of 'choices'"
    return None


def _message(message: Any, at: int) -> str | None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return f"field 'messages'[{at}] has no content; accepted: an object with role and content"
    if message.get("role") not in ROLES:
        return f"field 'messages'[{at}] has the role {message.get('role')!r}; accepted: {', '.join(ROLES)}"
    if message["role"] != "tool_call":
        return None
    try:
        call = json.loads(message["content"])
    except (ValueError, RecursionError):
        call = None
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
        return None
    return f"field 'messages'[{at}] is no call; accepted: JSON text of an object with name and arguments (an object)"


def _golden(call: Any, at: int) -> str | None:
    if isinstance(call, dict) and all(isinstance(call.get(name), str) for name in ("Action", "Action_Input")):
        return None
    return f"field 'golden_calls'[{at}] is no call; accepted: an object with the texts Action and Action_Input"


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _first(problems: Any) -> str | None:
    return next((p for p in problems if p), None)
