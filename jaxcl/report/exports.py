"""The numbers of a report for other programs and for papers: CSV, and LaTeX tables with booktabs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxcl.metrics.matrix_file import Matrix
from jaxcl.metrics.over_runs import over_runs
from jaxcl.metrics.trace import DELTAS
from jaxcl.report.config import repetitions
from jaxcl.report.heat import cells, row_names, short
from jaxcl.report.run_files import HEADLINES, Run

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def headlines(runs: Sequence[Run]) -> tuple[str, ...]:
    """The metrics of the summary: also those against a baseline, and of general ability, where some run has it."""
    more = ("intransigence_mean", "fwt_plasticity", DELTAS["general"].name)
    return (*HEADLINES, *(k for k in more if any(r.metric(k)["value"] is not None for r in runs)))


def groups(runs: Sequence[Run]) -> list[tuple[list[Run], dict[str, tuple[float, float] | None]]]:
    """(runs that differ in seed or order only, {metric: (mean, sample deviation)}), two or more finished ones each."""
    alike = [[r for r in g if r.whole and not r.state] for g in repetitions(runs)]
    return [(g, over_runs([{k: m["value"] for k, m in r.numbers.items()} for r in g])) for g in alike if len(g) > 1]


def metrics_csv(runs: Sequence[Run]) -> str:
    """One line a run and metric: run, methods, metric, value, low, high, reason, convention."""
    rows: list[list[Any]] = []
    for r in runs:
        for name, m in r.numbers.items():
            value = "" if m["value"] is None else repr(m["value"])
            text = [m.get("reason", ""), m["convention"]]
            rows.append([r.name, r.methods, name, value, *m.get("interval", ("", "")), *text])
    return _csv(["run", "methods", "metric", "value", "low", "high", "reason", "convention"], rows)


def matrix_csv(runs: Sequence[Run]) -> str:
    """One line a run, row and eval: value, its 95% interval over the items, their number. Row 0: before training."""
    rows: list[list[Any]] = []
    for r in runs:
        if not r.measured:
            continue
        for t, (name, values) in enumerate(zip(row_names(r.matrix), cells(r.matrix))):
            for i, e in enumerate(r.matrix.evals):
                low, high = r.bounds[:, t, i]
                rows.append([r.name, t, name, e.id, e.metric, e.role, *map(_plain, (values[i], low, high)), e.n])
    return _csv(["run", "row", "stage", "eval", "metric", "role", "value", "low", "high", "n"], rows)


def groups_csv(runs: Sequence[Run]) -> str:
    """One line a group of runs and metric: methods, runs, metric, mean, sample deviation over seeds and orders."""
    rows: list[list[Any]] = []
    for g, found in groups(runs):
        names = " ".join(r.name for r in g)
        rows += [[g[0].methods, names, len(g), k, repr(v[0]), repr(v[1])] for k, v in found.items() if v is not None]
    return _csv(["methods", "runs", "n", "metric", "mean", "deviation"], rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    numeric = {"value", "low", "high", "mean", "deviation", "n", "row"}
    writer.writerows([v if k in numeric else _safe(str(v)) for k, v in zip(head, row)] for row in rows)
    return out.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def _safe(text: str) -> str:
    """A name that a spreadsheet would take for a formula gets a quote in front."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def metrics_tex(runs: Sequence[Run]) -> str:
    """A booktabs table, one run a line, intervals small behind the value, a dash where there is no value; then, where
    runs repeat each other, a second one with mean and sample deviation."""
    shown = headlines(runs)
    rows = []
    for r in runs:
        name = tex(r.name) + (" (partial)" if r.state else "")
        rows.append([name, *(_tex_cell(r, k) for k in shown)])
    tables = [_tabular(["run", *map(tex, shown)], rows)]
    if found := groups(runs):
        rows = [[tex(g[0].methods), str(len(g)), *(_tex_mean(v.get(k)) for k in shown)] for g, v in found]
        tables.append("% mean and sample deviation over seeds and orders")
        tables.append(_tabular(["methods", "runs", *map(tex, shown)], rows))
    return "\n".join(["% needs \\usepackage{booktabs}", *tables, ""])


def matrix_tex(m: Matrix) -> str:
    """The matrix as a booktabs table: row 0 above a line, the cell of an eval's own stage bold."""
    rows = []
    for t, (name, values) in enumerate(zip(row_names(m), cells(m))):
        own = [m.learned(e.id) == t - 1 for e in m.evals]
        shown = ["--" if math.isnan(v) else f"${short(v)}$" for v in values]
        rows.append([tex(name), *(f"$\\mathbf{{{s[1:-1]}}}$" if o and s != "--" else s for s, o in zip(shown, own))])
    head = ["", *(tex(e.id) for e in m.evals)]
    return "% needs \\usepackage{booktabs}\n" + _tabular(head, rows, rule_after=1) + "\n"


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]], rule_after: int | None = None) -> str:
    lines = [" & ".join(row) + " \\\\" for row in rows]
    if rule_after is not None:
        lines.insert(rule_after, "\\midrule")
    start = [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule", " & ".join(head) + " \\\\", "\\midrule"]
    return "\n".join([*start, *lines, "\\bottomrule", "\\end{tabular}"])


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def _tex_cell(r: Run, metric: str) -> str:
    m = r.metric(metric)
    if m["value"] is None:
        return "--"
    between = " {{\\footnotesize [{:.3f}, {:.3f}]}}".format(*m["interval"]) if "interval" in m else ""
    return f"${m['value']:.3f}${between}"


def _tex_mean(found: tuple[float, float] | None) -> str:
    return "--" if found is None else f"${found[0]:.3f} \\pm {found[1]:.3f}$"
