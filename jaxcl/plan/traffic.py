"""Bytes that a compiled step reads from and writes to a chip's memory, read off its HLO text.

What an operation outside of any fusion takes and gives goes through memory, unless the compiler keeps it on the chip.
Of an array that is only sliced, the slice counts; of one that is updated in place, the update. Padding of layouts is
left out.
"""

from __future__ import annotations

from jaxcl.plan.hlo import KINDS, Op, Program, called, counts, fused, size

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier")  # fmt: skip
Ops = dict[str, Op]


def traffic(program: Program) -> int:
    """Bytes of one chip and one step."""
    times, inside = counts(program), fused(program)
    run = {name: n for name, n in times.items() if name not in inside}
    return sum(n * sum(_moved(program, here, op) for op in here.values()) for name, n in run.items()
               if (here := program.computations[name]))  # fmt: skip


def _moved(program: Program, here: Ops, op: Op) -> int:
    if op.code in FREE or op.code.endswith(("-done", "-update")):
        return 0
    if op.code.endswith("-start") and op.code.removesuffix("-start") not in KINDS:
        return size(op.type, hbm=True) // 2 if op.code == "copy-start" else 0  # the others run what they call
    if op.code == "dynamic-update-slice":
        return 2 * size(here[op.operands[1]].type, hbm=True)
    if op.code in ("dynamic-slice", "gather", "slice"):
        return 2 * size(op.type, hbm=True)
    if op.code != "fusion":
        return size(op.type, hbm=True) + sum(size(here[n].type, hbm=True) for n in op.operands)
    body = program.computations[called(op)[0]]
    taken = sum(_read(program, body, i) for i, n in enumerate(op.operands) if size(here[n].type, hbm=True))
    return taken + (_written(body) if size(op.type, hbm=True) else 0)


def _read(program: Program, body: Ops, index: int) -> int:
    """Bytes that a fused computation reads of its parameter."""
    name = next((o.name for o in body.values() if o.code == "parameter" and int(o.args) == index), None)
    return _used(program, body, name) if name else 0


def _used(program: Program, body: Ops, name: str) -> int:
    """Bytes of a value that its users look at; never more than there are."""
    total, most = 0, size(body[name].type)
    for user in (o for o in body.values() if name in o.operands):
        at = user.operands.index(name)
        if user.code in ("dynamic-slice", "slice", "gather") and at == 0:
            total += size(user.type)
        elif user.code == "dynamic-update-slice" and at == 0:
            continue
        elif user.code == "bitcast" and not user.root:
            total += _used(program, body, user.name)
        elif user.code == "fusion":
            total += _read(program, program.computations[called(user)[0]], at)
        else:
            return most
    return min(total, most)


def _written(body: Ops) -> int:
    """Bytes that a fused computation writes: of an update in place the update alone."""
    ends = [o for o in body.values() if o.root]
    parts = [body[n] for o in ends for n in o.operands] if ends and ends[0].code == "tuple" else ends
    total = 0
    for part in parts:
        while part.code == "bitcast" and part.operands[0] in body:
            part = body[part.operands[0]]
        kept = body[part.operands[1]] if part.code == "dynamic-update-slice" else part
        total += size(kept.type)
    return total
