"""The curves of a report's page: averages, single tasks, general ability and training loss over the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxcl.metrics.score import task_columns
from jaxcl.report.config import repetitions
from jaxcl.report.heat import beside_columns, cells, changes, measured, role_means, row_names
from jaxcl.report.html import Html, note, section, tag
from jaxcl.report.run_files import Logged, Run
from jaxcl.report.svg import COLOURS, DASHES, Curve, Look, Point, chart, padded, span, swatch

_WIDE, _PANEL = (1060, 240), (340, 190)
_AVERAGES = {
    "aa": "aa, of the tasks seen so far",
    "fgt_max": "fgt_max, lower is better",
    "bwt_over_T_minus_1": "bwt_over_T_minus_1",
}
_MOST = 160  # points of a learning curve
Values = Sequence[float] | np.ndarray


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """{run: colour and dashes}: repetitions of one run share a colour and differ in their dashes. Runs of the whole
    stream choose first."""
    out = {}
    for k, group in enumerate(repetitions(sorted(runs, key=lambda r: not r.whole))):
        for j, r in enumerate(group):
            out[r.name] = Look(k % COLOURS, (k // COLOURS + j) % len(DASHES))
    return out


def averages(runs: Sequence[Run]) -> Html:
    """What is known after each stage of all tasks seen so far. Repetitions get a band: mean and sample deviation."""
    there, look = [r for r in runs if r.whole], looks(runs)
    if max((len(r.matrix.rows) for r in there), default=0) < 2:
        return Html("")
    ticks = stage_ticks(there)
    xs, panels = (0.7, len(ticks) - 0.7), []
    for metric, title in _AVERAGES.items():
        drawn = [c for group in repetitions(there) for c in _average(group, metric, look)]
        label = f"{title}, after each stage. " + _words(there, lambda r, m=metric: _series(r, m))
        panels.append(_figure(title, chart(drawn, label=label, size=_PANEL, ticks=ticks, xs=xs)))
    return section("Averages over the stages", legend(there, look), _grid(panels), anchor="averages")


def _average(group: Sequence[Run], metric: str, look: dict[str, Look]) -> list[Curve]:
    """A metric's curve of each of a group's runs; the first carries the group's band."""
    rows = [_series(r, metric) for r in group]
    out = []
    for j, (r, row) in enumerate(zip(group, rows)):
        say = lambda t, v, r=r: f"{r.name}, {_after(r, t)}: {v:.4f}"  # noqa: E731
        out.append(Curve(_points(row, say, 1), look[r.name], _band(rows) if j == 0 else ()))
    return out


def _series(r: Run, metric: str) -> list[float]:
    return [math.nan if v is None else v for v in r.score.get("series", {}).get(metric, [])]


def _band(rows: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    if len(rows) < 2:
        return []
    values = np.array([row[: min(map(len, rows))] for row in rows])
    mean, deviation = values.mean(0), values.std(0, ddof=1)
    return [(t + 1, m - d, m + d) for t, (m, d) in enumerate(zip(mean, deviation)) if not math.isnan(m)]


def _points(values: Values, say: Callable[[int, float], str], start: int = 0, own: int | None = None) -> list[Point]:
    return [Point(t, float(v), say(t, v), t == own) for t, v in enumerate(values, start) if not math.isnan(v)]


def stage_ticks(runs: Sequence[Run]) -> list[str]:
    """Names of the places 0, 1, ...: the stages, or their numbers where the runs differ in order."""
    longest = max(runs, key=lambda r: len(r.matrix.rows)).matrix
    names = [s.name for s in longest.stages[: len(longest.rows)]]
    alike = all(r.matrix.stages == longest.stages for r in runs)
    return ["before", *(names if alike else map(str, range(1, len(names) + 1)))]


def _after(r: Run, t: int) -> str:
    return row_names(r.matrix)[t]


def _words(runs: Sequence[Run], of: Callable[..., Values]) -> str:
    """The numbers of curves in words."""
    told_ = {r.name: ", ".join("not measured" if math.isnan(v) else f"{v:.3f}" for v in of(r)) for r in runs}
    return "; ".join(f"{name}: {values}" for name, values in told_.items())


def tasks(runs: Sequence[Run]) -> Html:
    """One panel a task: its score before training and after each stage, a ring at its own stage, and where it is known
    the level of a model that learned this task alone."""
    there, look = [r for r in runs if r.whole], looks(runs)
    if not there or not max(len(r.matrix.rows) for r in there):
        return Html("")
    first, ticks, panels = there[0].matrix, stage_ticks(there), []
    for i in task_columns(first):
        e, curves = first.evals[i], []
        for r in there:
            k = _column(r, e.id)
            stage = r.matrix.learned(e.id)
            own = None if stage is None else stage + 1
            say = lambda t, _, r=r, k=k: f"{r.name}, {_after(r, t)}: {measured(r, t, k)}"  # noqa: E731
            curves.append(Curve(_points(cells(r.matrix)[:, k], say, own=own), look[r.name]))
        level = math.nan if first.single is None else float(first.single[i])
        levels = [] if math.isnan(level) else [(level, f"alone: {level:.4f}")]
        label = f"{e.id} ({e.metric}) before training and after each stage. "
        label += _words(there, lambda r, e=e: cells(r.matrix)[:, _column(r, e.id)])
        drawn = chart(curves, label=label, size=_PANEL, ticks=ticks, ys=_shared(there, e.id), levels=levels)
        panels.append(_figure(f"{e.id} ({_direction(e.metric, e.higher_is_better)})", drawn))
    text = "A ring marks the task's own stage."
    text += " Dotted: trained on this task alone." if first.single is not None else ""
    return section("Every task over the stages", note(text), legend(there, look), _grid(panels), anchor="tasks")


def _direction(metric: str, higher: bool) -> str:
    return metric if higher else f"{metric}, lower is better"


def _column(r: Run, eval_id: str) -> int:
    return next(i for i, e in enumerate(r.matrix.evals) if e.id == eval_id)


def _shared(runs: Sequence[Run], eval_id: str) -> tuple[float, float]:
    """One y axis for all evals of a scale, so that panels can be compared."""
    like = runs[0].matrix.evals[_column(runs[0], eval_id)]
    found: list[float] = []
    for r in runs:
        for i, e in enumerate(r.matrix.evals):
            if (e.role, e.metric, e.range) == (like.role, like.metric, like.range):
                single = [] if r.matrix.single is None else [r.matrix.single[i]]
                found += [v for v in (*cells(r.matrix)[:, i], *single) if not math.isnan(v)]
    return padded(span(found))


def drift(runs: Sequence[Run]) -> Html:
    """Evals that no stage teaches, as change since row 0, positive for better: their mean first, then each."""
    there, look = [r for r in runs if r.whole], looks(runs)
    if not any(len(r.matrix.rows) for r in there) or not beside_columns(there[0].matrix):
        return Html("")
    first = there[0].matrix
    of: dict[str, Callable[..., Values]] = {}
    for role in role_means(there[0]):
        of[f"mean of {role}"] = lambda r, role=role: role_means(r).get(role, ())
    for e in (first.evals[i] for i in beside_columns(first)):
        of[f"{e.id} ({e.role}, {e.metric})"] = lambda r, e=e: changes(r.matrix)[:, _column(r, e.id)]
    panels, ticks = [], stage_ticks(there)
    for title, values in of.items():
        curves = []
        for r in there:
            say = lambda t, v, r=r: f"{r.name}, {_after(r, t)}: {v:+.4f}"  # noqa: E731
            curves.append(Curve(_points(values(r), say), look[r.name]))
        label = f"Change of {title} since before training. {_words(there, values)}"
        panels.append(_figure(title, chart(curves, label=label, size=_PANEL, ticks=ticks, levels=[(0.0, "no change")])))
    text = "Change since before training, positive for better. No stage teaches these."
    return section("Drift of general ability", note(text), legend(there, look), _grid(panels), anchor="drift")


def learning(runs: Sequence[Run]) -> Html:
    """The training loss of every run on shared axes, a line where a stage begins."""
    there, look = [r for r in runs if len(r.log) > 1], looks(runs)
    if not there:
        return Html("")
    curves = {r.name: smoothed(r.log, _MOST) for r in there}
    ys = padded(span([y for c in curves.values() for _, y, _ in c]))
    xs = span([float(p.step) for r in there for p in r.log])
    panels = []
    for r in there:
        points = [Point(x, y, text) for x, y, text in curves[r.name]]
        starts = [(float(p.step), _stage_name(r, p.stage)) for p, q in zip(r.log[1:], r.log) if q.stage != p.stage]
        starts = [(float(r.log[0].step), _stage_name(r, r.log[0].stage)), *starts]
        label = f"Training loss of {r.name}: {r.log[0].loss:.3f} at first, {r.log[-1].loss:.3f} at last"
        size = _WIDE if len(there) == 1 else _PANEL
        drawn = chart([Curve(points, look[r.name], width=1.3)], label=label, size=size, xs=xs, ys=ys, breaks=starts)
        panels.append(_figure(r.name, drawn, wide=len(there) == 1, cls="ghosts"))
    text = (
        "Training loss by step, without what methods add to it; long runs as means over equal stretches. "
        "A line marks where a stage begins."
    )
    return section("Learning curves", note(text), _grid(panels), anchor="learning")


def _stage_name(r: Run, stage: int) -> str:
    return r.matrix.stages[stage].name if 0 <= stage < len(r.matrix.stages) else f"stage {stage + 1}"


def smoothed(log: Sequence[Logged], most: int) -> list[tuple[float, float, str]]:
    """(step, loss, words), about ``most`` of them at most: means over equal stretches, none across two stages."""
    out = []
    for stage in sorted({p.stage for p in log}):
        part = [p for p in log if p.stage == stage]
        for stretch in np.array_split(np.arange(len(part)), min(len(part), max(1, round(most * len(part) / len(log))))):
            steps, losses = [part[i].step for i in stretch], [part[i].loss for i in stretch]
            loss = float(np.mean(losses))
            name = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
            out.append((float(np.mean(steps)), loss, f"{name}: loss {loss:.4f}"))
    return out


def legend(runs: Sequence[Run], look: dict[str, Look]) -> Html:
    """Which line is which run; nothing for one run."""
    if len(runs) < 2:
        return Html("")
    return tag("ul", *(tag("li", swatch(look[r.name]), " ", r.name) for r in runs), cls="legend")


def _figure(title: str, drawn: Html, *, wide: bool = False, cls: str = "") -> Html:
    names = " ".join(filter(None, (cls, "across" if wide else "")))
    return tag("figure", tag("figcaption", title), drawn, cls=names or None)


def _grid(panels: Sequence[Html]) -> Html:
    return tag("div", *panels, cls="panels")
