"""A plan in a terminal."""

from __future__ import annotations

from typing import Any

from jaxcl.cli.terminal import console, plain_table
from jaxcl.plan.report import Plan


def amount(x: float | None, unit: str, base: int = 1000) -> str:
    """``3.26 GB``, ``17.2 TFLOP``: three digits and a prefix; GiB with ``base`` 1024."""
    if x is None:
        return "-"
    prefixes = ("", "k", "M", "G", "T", "P", "E") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
    i = 0
    while abs(x) >= base and i < len(prefixes) - 1:
        x, i = x / base, i + 1
    return f"{x:.3g} {prefixes[i]}{unit}"


def gib(x: float | None) -> str:
    return amount(x, "B", 1024)


def verdict(found: Plan) -> str:
    """One line: whether it fits, or what would make it."""
    memory = found["memory"]
    total, capacity = memory["total"], gib(memory["capacity"])
    need = f"{gib(total)} of {capacity} a chip" if total else f"more than the {capacity} of a chip"
    changes = ", ".join(c["change"] for c in found.get("changes", ()))
    if found["fits"]:
        return f"fits: {need}" + (f", with {changes}" if changes else "")
    more = f"; weights and memories want at least {found['least_chips']} chips" if "least_chips" in found else ""
    tried = "tried without success" if "unchanged" in found else "to try (--suggest compiles them)"
    return f"does not fit: {need}; {tried}: {changes or 'nothing left'}{more}"


def shown(found: Plan) -> None:
    """Prints the plan."""
    out, batch = console(), found["batch"]
    mesh = " x ".join(f"{k} {v}" for k, v in found["mesh"].items())
    out.print(f"{found['experiment']} on {found['devices']} {found['chip']} ({found['topology']}), mesh {mesh}")
    parts = f" in {batch['accumulate']} parts" if batch["accumulate"] > 1 else ""
    out.print(f"stage {found['stage']}, phase {found['phase']}: {batch['rows']} rows, {batch['tokens']} tokens{parts}")
    for note in found["notes"]:
        out.print(f"note: {note}")
    out.print(verdict(found))
    for change in found.get("changes", ()):
        out.print(f"  {change['change']}: {change['why']}")
    rows = [{"bytes of a chip": k, "given to the step": gib(v)} for k, v in found["state"].items()]
    out.print(plain_table(rows, ("bytes of a chip", "given to the step")))
    rows = [{"memory of a chip": k, "allotted": gib(v)} for k, v in found["memory"].items() if isinstance(v, int)]
    out.print(plain_table(rows, ("memory of a chip", "allotted")))
    if "roofline" in found:
        out.print(plain_table(messages(found), ("messages of a chip", "a step", "sent")))
        out.print(plain_table(times(found), ("time of a step", "seconds", "from")))
        line = found["roofline"]
        out.print(f"at least {line['step_s']:.3g} s a step, by {line['bound']}; MFU at most {line['mfu']:.1%}")
        out.print("; ".join(f"{k} = {v}" for k, v in line["formulas"].items()))
    big = [{**x, "per chip": gib(x["bytes"]), "shape": "x".join(map(str, x["shape"]))} for x in found["largest"]]
    out.print(plain_table([{"largest arrays": x.pop("name"), **x} for x in big],
                          ("largest arrays", "shape", "dtype", "spec", "per chip")))  # fmt: skip


def messages(found: Plan) -> list[dict[str, Any]]:
    return [
        {"messages of a chip": kind, "a step": v["times"], "sent": amount(v["bytes"], "B")}
        for kind, v in found["collectives"].items()
    ]


def times(found: Plan) -> list[dict[str, Any]]:
    line, work = found["roofline"], found["flops"]
    how = {
        "compute": f"{amount(work['per_chip'], 'FLOP')} a chip, at its bfloat16 peak",
        "memory": f"{amount(line['hbm_bytes'], 'B')} read and written",
        "collectives": f"{amount(line['sent_bytes'], 'B')} sent",
    }
    return [{"time of a step": k, "seconds": f"{line[f'{k}_s']:.3g}", "from": v} for k, v in how.items()]
