"""Heat maps that are tables: the value as text, its place in the range as colour, the whole story on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxcl.metrics.matrix_file import Eval, Matrix
from jaxcl.metrics.score import task_columns
from jaxcl.report.html import DASH, Html, tag
from jaxcl.report.run_files import Run

STEPS = 20  # shades v0 ... v20 of the style sheet


def row_names(m: Matrix) -> list[str]:
    """Names of the rows, row 0 first."""
    return ["before training", *(f"after {s.name}" for s in m.stages[: len(m.rows)])]


def cells(m: Matrix) -> np.ndarray:
    """f64[1 + rows, evals], row 0 on top."""
    return np.vstack([m.row0[None], m.rows])


Scales = dict[tuple, tuple[float, float]]
"""{metric, direction and range of an eval: the values of the palest and of the deepest colour}."""


def scales(matrices: Sequence[Matrix]) -> Scales:
    """The ends of every eval's range, or where it lacks one the values found in all matrices: so that colours can be
    compared across columns and runs."""
    found: dict[tuple, list[float]] = {}
    for m in matrices:
        for i, e in enumerate(m.evals):
            found.setdefault(e[1:4], []).extend(v for v in cells(m)[:, i] if not math.isnan(v))
    return {k: k[2] if all(map(math.isfinite, k[2])) else (min(v), max(v)) for k, v in found.items() if v}


def shades(m: Matrix, among: Scales) -> np.ndarray:
    """f64[1 + rows, evals] in 0..1: where each cell stands between the ends of its scale, 1 is good. NaN: not measured.
    """
    out = cells(m)
    for i, e in enumerate(m.evals):
        lo, hi = among.get(e[1:4], (0.0, 1.0))
        out[:, i] = (out[:, i] - lo) / (hi - lo) if hi > lo else out[:, i] * 0 + 0.5
        out[:, i] = out[:, i] if e.higher_is_better else 1 - out[:, i]
    return np.clip(out, 0, 1)


def short(value: float) -> str:
    """As many digits as a cell has room for."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def told(r: Run, row: int, column: int) -> str:
    """A cell in words: stage, eval, value, interval over its items."""
    return f"{row_names(r.matrix)[row]}, {r.matrix.evals[column].id}: {measured(r, row, column)}"


def measured(r: Run, row: int, column: int) -> str:
    """The value of a cell and its interval, as far as there are any."""
    value, (lo, hi) = cells(r.matrix)[row, column], r.bounds[:, row, column]
    if math.isnan(value):
        return "not measured"
    return f"{value:.6g}" + ("" if math.isnan(lo) else f" (95% interval {lo:.4g} to {hi:.4g})")


def task_matrix(r: Run, among: Scales) -> Html:
    """The matrix of what the stages teach, columns in the run's order of stages; each eval's own stage is outlined."""
    m = r.matrix
    columns = sorted(task_columns(m), key=lambda i: m.learned(m.evals[i].id) or 0)
    values, shade = cells(m), shades(m, among)
    rows = []
    for t, name in enumerate(row_names(m)):
        inside = []
        for i in columns:
            own = " own" if m.learned(m.evals[i].id) == t - 1 else ""
            inside.append(_cell(values[t, i], short(values[t, i]), shade[t, i], "h", own, told(r, t, i)))
        rows.append(tag("tr", tag("th", name, scope="row"), *inside))
    state = f" ({r.state})" if r.state else ""
    return _table(f"Task matrix of {r.name}{state}", [_head(m.evals[i]) for i in columns], rows)


def largest_change(matrices: Sequence[Matrix]) -> float:
    """The size of the largest change beside the tasks: the deepest colour of `drift_matrix`."""
    found = [np.abs(changes(m)[:, beside_columns(m)]).ravel() for m in matrices]
    return float(np.nanmax(np.concatenate([*found, [0.0]]))) or 1.0


def drift_matrix(r: Run, largest: float) -> Html:
    """Evals that no stage teaches: row 0 as measured, then what each stage changed since (positive: better), and the
    mean over those of a role."""
    m, columns = r.matrix, beside_columns(r.matrix)
    if not columns:
        return Html("")
    values, deltas = cells(m), changes(m)
    means = role_means(r)
    rows = []
    for t, name in enumerate(row_names(m)):
        inside = []
        for i in columns:
            if t == 0:
                inside.append(_cell(values[0, i], short(values[0, i]), math.nan, "h", "", told(r, 0, i)))
            else:
                inside.append(_change(deltas[t, i], largest, f"{told(r, t, i)}; change {deltas[t, i]:+.4g}"))
        for role, mean in means.items():
            title = f"{name}: mean change of {role} {mean[t]:+.4g}"
            inside.append(tag("td") if t == 0 else _change(mean[t], largest, title))
        rows.append(tag("tr", tag("th", name, scope="row"), *inside))
    heads = [_head(m.evals[i]) for i in columns] + [_mean_head(r, role) for role in means]
    return _table(f"Change beside the tasks of {r.name}", heads, rows)


def beside_columns(m: Matrix) -> list[int]:
    """Evals beside the stream. Tasks of the stream that this run does not learn are none of them."""
    return [i for i in range(len(m.evals)) if i not in task_columns(m) and m.evals[i].role != "task"]


def changes(m: Matrix) -> np.ndarray:
    """f64[1 + rows, evals]: each cell minus row 0, positive where the model became better."""
    sign = np.array([1.0 if e.higher_is_better else -1.0 for e in m.evals])
    return (cells(m) - m.row0) * sign


def role_means(r: Run) -> dict[str, np.ndarray]:
    """{role: f64[1 + rows]}: the mean change over a role's evals as the score has it, where it averages two or more."""
    found, out = r.score["drift"], {}
    for role, steps in found["per_stage"].items():
        evals = sum(e["role"] == role for e in found["evals"].values())
        if role != "task" and evals - len(found["mean_delta"][role].get("left_out", ())) > 1:
            out[role] = np.array([0.0, *(math.nan if v is None else v for v in steps)])
    return out


def _mean_head(r: Run, role: str) -> Html:
    left_out = r.score["drift"]["mean_delta"][role].get("left_out", ())
    title = f"without the losses {', '.join(left_out)}" if left_out else None
    return tag("th", f"mean of {role}", scope="col", title=title)


def _change(delta: float, largest: float, title: str) -> Html:
    kind = "u" if delta >= 0 else "d"
    return _cell(delta, f"{delta:+.3f}", abs(delta) / largest, kind, "", title)


def _cell(value: float, shown: str, shade: float, kind: str, own: str, title: str) -> Html:
    if math.isnan(value):
        return tag("td", DASH, cls=own.strip() or None, title=title)
    step = None if math.isnan(shade) else round(STEPS * shade)
    colour = "" if step is None else f"{kind} v{step}"
    return tag("td", shown, cls=(colour + own).strip() or None, title=title)


def _head(e: Eval) -> Html:
    direction = "higher" if e.higher_is_better else "lower"
    return tag("th", e.id, scope="col", title=f"{e.metric}, {direction} is better, {e.n} items, role {e.role}")


def _table(caption: str, heads: Sequence[Html], rows: Sequence[Html]) -> Html:
    top = tag("tr", tag("td"), *heads)
    inside = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *rows), cls="heat")
    return tag("div", inside, cls="wide")
