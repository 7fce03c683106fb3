"""The parts of a report's page. Each takes runs and returns HTML; all text from files is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcl.metrics.bootstrap import differences
from jaxcl.metrics.matrix import METRICS
from jaxcl.report.figures import DARK, LIGHT, Theme, lines_png, matrix_png, row_names, smoothed
from jaxcl.report.html import Html, details, esc, picture, table, tag
from jaxcl.report.run_files import HEADLINES, Run, config_differences, flatten

_DASH = Html("&ndash;")
_INTERVALS = (
    "Small numbers: 95% intervals of a paired bootstrap over test items. They say how much depends on the "
    "choice of the test items, nothing about seeds or task orders."
)


def value_cell(m: Mapping[str, Any] | None) -> Html:
    """A metric's value with its interval below; a dash that tells its reason where there is no value."""
    if m is None or m["value"] is None:
        return tag("span", _DASH, title=(m or {}).get("reason", "not measured"))
    below = [tag("span", "{:.3f} to {:.3f}".format(*m["interval"]), cls="between")] if "interval" in m else []
    return tag("span", f"{m['value']:.4f}", *below, cls="value")


def summary(runs: Sequence[Run]) -> Html:
    """One line a run under the headline metrics."""
    rows = []
    for r in runs:
        metrics = r.score.get("metrics", {})
        rows.append([_titled(r), r.methods or _DASH, *(value_cell(metrics.get(k)) for k in HEADLINES)])
    parts = [table(["run", "methods", *HEADLINES], rows)]
    if any("interval" in m for r in runs for m in r.score.get("metrics", {}).values()):
        parts.append(tag("p", _INTERVALS, cls="note"))
    for r in runs:
        if reason := r.score.get("intervals", {}).get("reason"):
            parts.append(tag("p", f"{r.name}: no intervals, {reason}.", cls="note"))
    if any(r.score.get("sign", "").startswith("losses") for r in runs):
        parts.append(tag("p", "Scores are losses, negated first, so that higher is better.", cls="note"))
    return tag("section", tag("h2", "Summary"), *parts)


def _titled(r: Run) -> Html:
    return tag("span", r.name, *([tag("span", r.state, cls="between partial")] if r.state else []))


def paired(runs: Sequence[Run]) -> Html:
    """Each run minus the first on the same test items, where both have stages done and predictions."""
    first, others = runs[0], runs[1:]
    rows, notes = [], []
    for r in others:
        if not (first.measured and r.measured):
            continue
        found, reason = differences((first.matrix, first.path), (r.matrix, r.path))
        if reason:
            notes.append(tag("p", f"{r.name}: no paired difference, {reason}.", cls="note"))
            continue
        rows.append([r.name, *(_difference(first, r, k, found.get(k)) for k in HEADLINES)])
    if not rows:
        return Html("".join(notes))
    text = f"Differences to {first.name}, on the same test items; grey: the 95% interval covers 0."
    return tag("section", tag("h2", "Paired differences"), tag("p", text, cls="note"),
               table(["run", *HEADLINES], rows), *notes)  # fmt: skip


def _difference(a: Run, b: Run, metric: str, interval: tuple[float, float] | None) -> Html:
    u, v = (r.score["metrics"][metric]["value"] for r in (a, b))
    if interval is None or u is None or v is None:
        return _DASH
    lo, hi = interval
    between = tag("span", f"{lo:+.3f} to {hi:+.3f}", cls="between")
    return tag("span", f"{v - u:+.4f}", between, cls="value unsure" if lo <= 0 <= hi else "value")


def _both(draw: Callable[[Theme], bytes], alt: str) -> Html:
    return picture(draw(LIGHT), draw(DARK), alt)


def progress(runs: Sequence[Run]) -> Html:
    """Average accuracy over the tasks seen so far, after each stage."""
    curves = {}
    for r in runs:
        points = enumerate(r.score.get("series", {}).get("aa", []))
        curves[r.name] = [(float(t), v) for t, v in points if v is not None]
    if max(map(len, curves.values()), default=0) < 2:
        return Html("")
    longest = max((r for r in runs if r.measured), key=lambda r: len(r.matrix.rows))
    names = [s.name for s in longest.matrix.stages[: len(longest.matrix.rows)]]
    words = "; ".join(f"{k}: " + ", ".join(f"{v:.3f}" for _, v in c) for k, c in curves.items())
    alt = f"Average accuracy after each stage. {words}"
    drawn = _both(lambda t: lines_png(curves, x="after stage", y="AA", theme=t, ticks=names), alt)
    return tag("section", tag("h2", "Average accuracy of the tasks seen so far"), drawn)


def one_run(r: Run) -> Html:
    """A run's matrix, metrics, drift, losses and accounting."""
    parts = [tag("h2", r.name)]
    if r.state:
        parts.append(tag("p", r.state, cls="partial"))
    if r.measured:
        parts += [_matrix(r), _metrics(r), _drift(r)]
    if len(r.losses) > 1:
        parts.append(tag("h3", "Training loss"))
        points = {r.name: smoothed(r.losses)}
        alt = f"Training loss of {r.name}: {r.losses[0][1]:.3f} at first, {r.losses[-1][1]:.3f} at last"
        parts.append(_both(lambda t: lines_png(points, x="step", y="loss", theme=t), alt))
    if r.accounting:
        rows = [[k, _leaf(v)] for k, v in flatten(r.accounting).items()]
        parts.append(details("Accounting", table(["what", "value"], rows)))
    if r.config:
        rows = [[k, _leaf(v)] for k, v in flatten(r.config).items()]
        parts.append(details("Config", table(["key", "value"], rows)))
    return tag("section", *parts)


def matrix_alt(r: Run) -> str:
    """The matrix in words, for those who do not see the picture."""
    lines = []
    for name, row in zip(row_names(r.matrix), [r.matrix.row0, *r.matrix.rows]):
        cells = ["not measured" if math.isnan(v) else f"{v:.3f}" for v in row]
        lines.append(f"{name}: " + ", ".join(f"{e.id} {c}" for e, c in zip(r.matrix.evals, cells)))
    return f"Accuracy matrix of {r.name}. " + ". ".join(lines)


def _matrix(r: Run) -> Html:
    m = r.matrix
    note = (
        "Rows: the model before training and after each stage. Columns: test sets. Outlined: its own stage."
    )
    rows = [
        [name, *(_DASH if math.isnan(v) else f"{v:.4f}" for v in row)]
        for name, row in zip(row_names(m), [m.row0, *m.rows])
    ]
    numbers = details("The same in numbers", table(["", *(e.id for e in m.evals)], rows))
    drawn = _both(lambda t: matrix_png(m, t), matrix_alt(r))
    return Html(tag("p", note, cls="note") + drawn + numbers)


def _metrics(r: Run) -> Html:
    rows = [[k, value_cell(m), m.get("reason") or m["convention"]] for k, m in r.score["metrics"].items()]
    inside = table(["metric", "value", "convention, or why there is no value"], rows)
    return details("All metrics and their conventions", inside)


def _drift(r: Run) -> Html:
    found = r.score["drift"]["evals"]
    if not found:
        return Html("")
    keys = ("role", "before", "after", "delta")
    rows = [[k, *(_leaf(v[c]) for c in keys)] for k, v in found.items()]
    return Html(tag("h3", "Beside the stream: general ability and probes") + table(["eval", *keys], rows))


def _leaf(v: Any) -> Html:
    if v is None or v == {} or v == []:
        return _DASH
    if isinstance(v, float):
        return esc(f"{v:.6g}")
    return esc(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))


def configs(runs: Sequence[Run]) -> Html:
    """What differs between the runs' configs."""
    rows = [[k, *map(_leaf, values)] for k, values in config_differences(runs)]
    equal = tag("p", "The configs are equal.", cls="note")
    inside = table(["key", *(r.name for r in runs)], rows) if rows else equal
    return tag("section", tag("h2", "What differs between the runs"), inside)


def conventions() -> Html:
    """What the names mean."""
    rows = [[name, METRICS[name].convention, METRICS[name].papers or _DASH] for name in HEADLINES]
    text = "R[t,i]: score on task i after stage t; T: the last stage; old tasks: those taught before it."
    return tag("section", tag("h2", "What the names mean"), tag("p", text, cls="note"),
               table(["metric", "convention", "used by"], rows))  # fmt: skip
