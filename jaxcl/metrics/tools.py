"""Tool calls: the right tool, the right arguments, the right answer, and calls that nobody asked for.

Card refine-align/tool-lifelong; after API-Bank (Li et al. 2023, arXiv 2304.08244) and ToolkenGPT (Hao et al. 2023,
arXiv 2305.11554). All tools so far are enabled whatever the item; an item may ask for several calls, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, Info, mean

CARD = "refine-align/tool-lifelong"
_CALLS = ("calls of every item",)


class Call(NamedTuple):
    """A tool's name and its arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]


Calls = Sequence[Call]
"""The calls of one item; none where the answer is plain text."""


def same_value(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are equal, 1 and true are not; lists in order, objects by key."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)


def same_tools(said: Calls, wanted: Calls) -> bool:
    return [call.name for call in said] == [call.name for call in wanted]


def same_calls(said: Calls, wanted: Calls) -> bool:
    return same_tools(said, wanted) and all(same_value(s.arguments, w.arguments) for s, w in zip(said, wanted))


def _pairs(said: Sequence[Calls], wanted: Sequence[Calls]) -> list[tuple[Calls, Calls]]:
    if len(said) != len(wanted) or not all(wanted):
        what = f"{len(said)} and {len(wanted)} items, {sum(not w for w in wanted)} of them without a wanted call"
        raise RequestError(f"{what}; accepted: one of each, every one with a call")
    return list(zip(said, wanted))


def call_accuracy(said: Sequence[Calls], wanted: Sequence[Calls]) -> float:
    """Share of items that called the wanted tools, whatever the arguments."""
    return mean([same_tools(s, w) for s, w in _pairs(said, wanted)], "items that ask for a tool")


def argument_accuracy(said: Sequence[Calls], wanted: Sequence[Calls]) -> float:
    """Share of items that called the wanted tools with the wanted arguments (API-Bank's call accuracy)."""
    return mean([same_calls(s, w) for s, w in _pairs(said, wanted)], "items that ask for a tool")


def argument_accuracy_of_right_calls(said: Sequence[Calls], wanted: Sequence[Calls]) -> Found:
    """The same over the items that called the wanted tools."""
    right = [same_calls(s, w) for s, w in _pairs(said, wanted) if same_tools(s, w)]
    return (mean(right, "items"), None) if right else (None, "undefined: no item called the wanted tools")


def answer_accuracy(right: Sequence[bool], said: Sequence[Calls]) -> float:
    """Share of items with the right final answer and a call: an answer without one is no success of the tool."""
    if len(right) != len(said):
        raise RequestError(f"{len(right)} answers and {len(said)} items; accepted: one of each")
    return mean([bool(ok) and len(calls) > 0 for ok, calls in zip(right, said)], "items that ask for a tool")


def over_trigger_rate(said_on_plain_text: Sequence[Calls]) -> Found:
    """Share of items that need no tool and got a call."""
    if not said_on_plain_text:
        return None, "undefined: no item without a tool was asked"
    return mean([len(calls) > 0 for calls in said_on_plain_text], "items"), None


def _info(name: str, convention: str, papers: str = "", *needs: str, worse: bool = False) -> Info:
    return Info(name=name, convention=convention, kind="tools", card=CARD, papers=papers, needs=needs or _CALLS,
                lower_is_better=worse)  # fmt: skip


INFO = (
    _info("tool_call_accuracy", "share of items that called the wanted tools, in order, whatever the arguments",
          "ToolkenGPT"),
    _info("tool_argument_accuracy", "share of items whose calls equal the wanted ones in name and every argument",
          "API-Bank"),
    _info("tool_argument_accuracy_of_right_calls",
          "as tool_argument_accuracy, over items that called the wanted tools"),
    _info("tool_answer_accuracy", "share of items with the right final answer after at least one call", "ToolkenGPT",
          "final answers", *_CALLS),
    _info("over_trigger_rate", "share of items that need no tool and got a call", "", "items without a tool",
          worse=True),
)  # fmt: skip
