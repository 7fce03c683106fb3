"""What a compiled program sends and moves, read off its HLO text: loops times their trips, fused collectives once.

XLA's own cost analysis counts the body of a loop once, whatever its trips. Here every computation has a count: how
often a step runs it. Bytes are of one chip. Text: https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_BRACKET = re.compile(r"[()]")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|body|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")


class Op(NamedTuple):
    """One instruction: its name, the text of its type, what it does, the text in its brackets, the rest of the line."""

    name: str
    type: str
    code: str
    args: str
    attrs: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of what it is applied to."""
        return re.findall(r"%([\w.\-]+)", self.args)


class Moved(NamedTuple):
    """Collectives of one kind in a step: how many run, and the bytes that a chip sends for them."""

    times: int
    bytes: int


class Program(NamedTuple):
    """{computation: {name: Op}} in the order of the text, and the name of the one that runs."""

    computations: dict[str, dict[str, Op]]
    entry: str


def parse(text: str) -> Program:
    """The program of ``compiled.as_text()``. ValueError where there is no entry computation."""
    computations: dict[str, dict[str, Op]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            here = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and " = " in line:
            op = _op(line)
            here[op.name] = op
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    return Program(computations, entry)


def _op(line: str) -> Op:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    cut = _closed(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:cut], rest[cut:].lstrip()
    opened = rest.index("(")
    closed = _closed(rest, opened)
    return Op(name.lstrip("%"), kind, rest[:opened], rest[opened + 1 : closed - 1], rest[closed:], "ROOT " in line[:10])


def _closed(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` has closed."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]}")


def size(kind: str, *, hbm: bool = False) -> int:
    """Bytes of a type, tuples summed; ``hbm``: without what the compiler keeps on the chip (memory space 1)."""
    total = 0
    for name, dims, layout in _ARRAY.findall(kind):
        if hbm and "S(" in layout:
            continue
        bits = BITS.get(name) or int(re.sub(r"\D", "", name) or 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def called(op: Op) -> list[str]:
    """Computations that an operation runs, without the conditions of loops and what reductions apply."""
    if op.code.endswith(("-done", "-update")):
        return []
    groups = [value for key, value in _CALLED.findall(op.attrs) if key != "to_apply" or op.code == "call"]
    return [name for value in groups for name in re.findall(r"%([\w.\-]+)", value)]


def trips(program: Program, loop: Op, around: dict[str, Op]) -> int:
    """How often a loop runs: what it says itself, else the bound that its counter stays below, less where it starts.
    1 where neither is known. ``around``: the computation that the loop is in."""
    known = re.search(r'known_trip_count"?[=:]\s*\{"?n"?:\s*"?(\d+)', loop.attrs)
    if known:
        return int(known[1])
    condition = program.computations[_attr(loop, r"condition=%([\w.\-]+)")]
    for test in condition.values():
        if test.code != "compare" or "direction=LT" not in test.attrs:
            continue
        counter, bound = (condition[n] for n in test.operands)
        if counter.code == "get-tuple-element" and bound.code == "constant":
            return int(bound.args) - _start(around, loop, int(_attr(counter, r"index=(\d+)")))
    return 1


def _attr(op: Op, pattern: str) -> str:
    found = re.search(pattern, op.attrs)
    if found is None:
        raise ValueError(f"HLO operation {op.name} lacks {pattern}")
    return found[1]


def _start(around: dict[str, Op], loop: Op, index: int) -> int:
    """The counter's first value: 0 unless a constant is put into the loop's tuple."""
    carried = around.get(loop.operands[0])
    if carried is None or carried.code != "tuple":
        return 0
    first = around.get(carried.operands[index])
    while first is not None and first.code in ("copy", "bitcast"):
        first = around.get(first.operands[0])
    return int(first.args) if first is not None and first.code == "constant" else 0


def counts(program: Program) -> dict[str, int]:
    """{computation: times that a step runs it}, fused ones with the operation that fuses them; of a conditional every
    branch counts as taken."""
    found: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        found[name] += times
        here = program.computations[name]
        for op in here.values():
            inner = times * trips(program, op, here) if op.code == "while" else times
            for other in called(op):
                walk(other, inner)

    walk(program.entry, 1)
    return dict(found)


def fused(program: Program) -> dict[str, str]:
    """{computation inside a fusion: the computation, outside of any, that runs it}."""
    out: dict[str, str] = {}

    def walk(name: str, outer: str, inside: bool) -> None:
        if inside:
            out[name] = outer
        for op in program.computations[name].values():
            for other in called(op):
                walk(other, outer if inside or op.code == "fusion" else other, inside or op.code == "fusion")

    walk(program.entry, program.entry, False)
    return out


def collectives(program: Program, devices: int) -> dict[str, Moved]:
    """{kind: Moved} of a step, as `sent` counts; ``devices``: in a group where the text names none.

    A collective that is fused with computation in steps is one: it has one channel.
    """
    times, inside = counts(program), fused(program)
    found: dict[tuple, tuple[str, int, int]] = {}
    for name, here in program.computations.items():
        for op in here.values() if name in times else ():
            kind = kind_of(op, here)
            if kind not in KINDS:
                continue
            held = sum(size(here[n].type) for n in op.operands)
            channel = re.search(r"channel_id=(\d+)", op.attrs)
            one = (inside[name], channel[1]) if channel and name in inside else (name, op.name)
            count = times[inside[name]] if name in inside else times[name]
            found[one] = (kind, count, sent(kind, held, group(op, devices)))
    out = {}
    for kind in KINDS:
        mine = [(count, each) for k, count, each in found.values() if k == kind]
        if mine:
            out[kind] = Moved(sum(c for c, _ in mine), sum(c * each for c, each in mine))
    return out


def kind_of(op: Op, here: dict[str, Op]) -> str:
    """What an operation does. An all-reduce of which only a slice is taken is a TPU's reduce-scatter."""
    users = [o.code for o in here.values() if op.name in o.operands]
    sliced = op.code == "all-reduce" and users and set(users) == {"dynamic-slice"}
    return "reduce-scatter" if sliced else op.code.removesuffix("-start")


def sent(kind: str, held: int, n: int) -> int:
    """Bytes that a chip sends, as ring algorithms do, in one collective of n chips of which each holds ``held`` bytes:
    n-1 times what it holds in an all-gather, (n-1)/n in a reduce-scatter or all-to-all, twice that in an all-reduce."""
    if kind == "collective-permute":
        return held
    if kind == "all-gather":
        return held * (n - 1)
    return held * (n - 1) // n * (2 if kind == "all-reduce" else 1)


def group(op: Op, devices: int) -> int:
    """Chips in a group: ``{{0,2},{1,3}}``, ``[2,2]<=[4]`` (groups, size) or ``mesh['a'=2,'b'=2] {'b'}``."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.attrs)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", op.attrs)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", op.attrs)
    if named is None:
        return devices
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
