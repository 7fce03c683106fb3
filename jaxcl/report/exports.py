"""metrics.csv and metrics.tex: the numbers of a report for other programs and for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from jaxcl.report.run_files import HEADLINES, Run

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def metrics_csv(runs: Sequence[Run]) -> str:
    """One line a run and metric: run, methods, metric, value, low, high, reason, convention."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "methods", "metric", "value", "low", "high", "reason", "convention"])
    for run in runs:
        for name, m in run.score.get("metrics", {}).items():
            low, high = m.get("interval", ("", ""))
            value = "" if m["value"] is None else repr(m["value"])
            text = [m.get("reason", ""), m["convention"]]
            writer.writerow([_safe(run.name), _safe(run.methods), name, value, low, high, *text])
    return out.getvalue()


def _safe(text: str) -> str:
    """A name that a spreadsheet would take for a formula gets a quote in front."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def metrics_tex(runs: Sequence[Run]) -> str:
    """A booktabs table, one run a line; intervals small behind the value, a dash where there is no value."""
    head = " & ".join(["run", *map(tex, HEADLINES)])
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(HEADLINES)}}}",
        "\\toprule",
        head + " \\\\",
        "\\midrule",
    ]
    for run in runs:
        name = tex(run.name) + (" (partial)" if run.state else "")
        lines.append(" & ".join([name, *(_tex_cell(run, k) for k in HEADLINES)]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def _tex_cell(run: Run, metric: str) -> str:
    m = run.score.get("metrics", {}).get(metric)
    if m is None or m["value"] is None:
        return "--"
    between = " {{\\footnotesize [{:.3f}, {:.3f}]}}".format(*m["interval"]) if "interval" in m else ""
    return f"${m['value']:.3f}${between}"
