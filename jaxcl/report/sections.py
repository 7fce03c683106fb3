"""The tables of a report's page. Each takes runs and returns HTML; all text from files is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcl.metrics.bootstrap import differences
from jaxcl.report.config import config_differences, flatten, seed_of
from jaxcl.report.exports import groups, headlines
from jaxcl.report.heat import cells, drift_matrix, largest_change, scales, task_matrix
from jaxcl.report.html import DASH, Html, cell, details, esc, note, number, section, table, tag
from jaxcl.report.run_files import Run
from jaxcl.report.together import same_order

_INTERVALS = (
    "Small numbers: 95% intervals of a paired bootstrap over test items. They say how much depends on the "
    "choice of the test items, nothing about seeds or task orders."
)


def metric_cell(m: Mapping[str, Any]) -> Html:
    """A metric's value with its interval below; a dash that tells its reason where there is no value."""
    if m["value"] is None:
        return cell(None, why=m.get("reason", "not measured"))
    below = [tag("span", "{:.3f} to {:.3f}".format(*m["interval"]), cls="between")] if "interval" in m else []
    return cell(m["value"], Html(number(m["value"]) + "".join(below)))


def _heads(runs: Sequence[Run], names: Sequence[str]) -> list[Html]:
    """Metrics as heads of columns, their convention on hover."""
    known = {k: m["convention"] for r in runs for k, m in r.numbers.items()}
    breaks = {k: Html(re.sub(r"_(?=[a-z]{3})", "_<wbr>", k)) for k in names}
    return [tag("span", text, title=known.get(k)) for k, text in breaks.items()]


def summary(runs: Sequence[Run]) -> Html:
    """One line a run under the headline metrics."""
    shown, several = headlines(runs), len(runs) > 1
    rows = []
    for r in runs:
        about = [_titled(r), r.methods or DASH] + ([_leaf(seed_of(r))] if several else [])
        rows.append([*about, *(metric_cell(r.metric(k)) for k in shown)])
    head = ["run", "methods", *(["seed"] if several else []), *_heads(runs, shown)]
    parts = [table(head, rows, sortable=several)]
    if any("interval" in m for r in runs for m in r.score.get("metrics", {}).values()):
        parts.append(note(_INTERVALS))
    for r in runs:
        if reason := r.score.get("intervals", {}).get("reason"):
            parts.append(note(f"{r.name}: no intervals, {reason}."))
    if scale := next((r.score["scale"] for r in runs if "scale" in r.score), None):
        parts.append(note(f"Metrics: {scale}."))
    for reason in sorted({m.get("reason", "") for r in runs for m in [r.metric("aa")]}):
        parts += [note(f"No averages: {reason}.")] if reason.startswith("evals of different scale") else []
    if any(r.score.get("sign", "").startswith("losses") for r in runs):
        parts.append(note("Scores are losses, negated first, so that higher is better."))
    return section("Summary", *parts, anchor="summary")


def _titled(r: Run) -> Html:
    below = r.state or (f"one task alone: {r.alone}" if r.alone else None)
    kind = "between partial" if r.state else "between"
    return tag("span", r.name, *([tag("span", below, cls=kind)] if below else []))


def repeated(runs: Sequence[Run]) -> Html:
    """Mean and sample deviation over runs that differ in seed or order only."""
    shown, rows = headlines(runs), []
    for group, found in groups(runs):
        orders = len({r.matrix.stages for r in group})
        names = tag("span", ", ".join(r.name for r in group), cls="between text")
        count = f"{len(group)} runs" + (f", {orders} orders" if orders > 1 else "")
        title = Html(esc(group[0].methods or group[0].name) + names)
        rows.append([title, count, *(_mean(found.get(k)) for k in shown)])
    if not rows:
        return Html("")
    text = "Mean and sample deviation over finished runs that differ in seed or order only, computed run by run."
    inside = table(["methods", "over", *_heads(runs, shown)], rows, sortable=len(rows) > 1)
    return section("Over seeds and orders", note(text), inside, anchor="repeated")


def _mean(found: tuple[float, float] | None) -> Html:
    if found is None:
        return cell(None, why="not every run has a value")
    below = tag("span", f"± {found[1]:.4f}", cls="between")
    return cell(found[0], Html(number(found[0]) + below))


def paired(runs: Sequence[Run]) -> Html:
    """Each run minus the first that learns the stream, on the same test items."""
    there = [r for r in runs if r.whole]
    shown, rows, notes = headlines(runs), [], []
    for r in there[1:]:
        found, reason = _differences(there[0], r)
        if reason:
            notes.append(note(f"{r.name}: no paired difference, {reason}."))
        else:
            rows.append([r.name, *(_difference(there[0], r, k, found.get(k)) for k in shown)])
    if not rows and not notes:
        return Html("")
    text = f"Differences to {there[0].name}, on the same test items; grey: the 95% interval covers 0."
    inside = [note(text), table(["run", *_heads(runs, shown)], rows, sortable=len(rows) > 1)] if rows else []
    return section("Paired differences", *inside, *notes, anchor="paired")


def _differences(a: Run, b: Run) -> tuple[dict[str, tuple[float, float]], str | None]:
    if not same_order(a.matrix, b.matrix):
        return {}, "another order of the stages"
    return differences((a.matrix, a.path), (b.matrix, b.path))


def _difference(a: Run, b: Run, metric: str, interval: tuple[float, float] | None) -> Html:
    u, v = (r.metric(metric)["value"] for r in (a, b))
    if interval is None or u is None or v is None:
        return cell(None, why="not defined in both runs")
    lo, hi = interval
    between = tag("span", f"{lo:+.3f} to {hi:+.3f}", cls="between")
    gain = round(v - u, 9) + 0.0  # no minus before nothing
    return cell(gain, tag("span", f"{gain:+.4f}", between, cls="unsure" if lo <= 0 <= hi else None))


def matrices(runs: Sequence[Run]) -> Html:
    """Heat maps: the task matrix of every run of the whole stream, and beside it what changed that no stage teaches."""
    there = [r for r in runs if r.whole]
    among, largest = scales([r.matrix for r in there]), largest_change([r.matrix for r in there])
    pairs = [tag("div", task_matrix(r, among), drift_matrix(r, largest), cls="beside") for r in there]
    text = (
        "Rows: the model before training and after each stage. Columns: test sets. Outlined: the column's own stage. "
        "The deeper the colour, the better. Rest on a cell for its interval, on a name for metric and number of items."
    )
    inside = tag("div", *pairs, cls="matrices")
    return section("Matrices", note(text), inside, anchor="matrices") if there else Html("")


def evals(runs: Sequence[Run]) -> Html:
    """Of one run, every eval with its intervals in plain sight: before training, after its own and the last stage."""
    if len(runs) > 1 or not runs[0].measured:
        return Html("")
    r, rows = runs[0], []
    for i, e in enumerate(r.matrix.evals):
        own, last = r.matrix.learned(e.id), len(r.matrix.rows)
        at = [0, *([None if own is None or own >= last else own + 1, last] if last else [])]
        about = f"{e.metric}, {'higher' if e.higher_is_better else 'lower'} is better"
        rows.append([e.id, about, cell(e.n, e.n), *(_scored(r, t, i) for t in at)])
    stages = ["after its own stage", "after the last stage"] if len(r.matrix.rows) else []
    inside = table(["eval", "metric", "items", "before training", *stages], rows, sortable=True)
    return section("Every eval", inside, anchor="evals")


def _scored(r: Run, t: int | None, column: int) -> Html:
    """A cell of the matrix with its interval below."""
    if t is None:
        return cell(None, why="no stage that is done teaches it")
    value, (lo, hi) = cells(r.matrix)[t, column], r.bounds[:, t, column]
    return metric_cell({"value": None if value != value else value} | ({} if lo != lo else {"interval": (lo, hi)}))


def metrics(runs: Sequence[Run]) -> Html:
    """Every metric of every run under its convention, once a stage is done."""
    there = [r for r in runs if len(r.matrix.rows)]
    rows = []
    for name, m in {k: m for r in there for k, m in r.numbers.items()}.items():
        about = m["convention"] + (f" ({m['papers']})" if m["papers"] else "")
        head = Html(esc(name) + tag("span", about, cls="between text"))
        rows.append([head, *(metric_cell(r.metric(name)) for r in there)])
    text = (
        "R[t,i]: score on task i after stage t; T: the last stage; old tasks: those taught before it. "
        "Rest on a dash for its reason."
    )
    inside = table(["metric", *(r.name for r in there)], rows, sortable=True, cls="tight")
    return section("All metrics and their conventions", note(text), inside, anchor="metrics") if there else Html("")


_ACCOUNT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "training (s)": lambda a: _total(a, "train"),
    "evaluation (s)": lambda a: _total(a, "eval"),
    "steps": lambda a: a.get("steps"),
    "forward passes": lambda a: a.get("forward_passes"),
    "backward passes": lambda a: a.get("backward_passes"),
    "past rows read": lambda a: a.get("past_rows_read"),
    "examples kept": lambda a: _kept(a, "examples"),
    "bytes kept": lambda a: _kept(a, "bytes"),
    "extra parameters": lambda a: a["parameters"].get("extra"),
    "trained parameters": lambda a: a["parameters"].get("trained"),
    "compilations": lambda a: a["compilations"].get("all"),
}


def _total(a: dict[str, Any], what: str) -> float:
    return sum(stage[what] for stage in a["seconds"])


def _kept(a: dict[str, Any], what: str) -> float:
    return sum(memory[what] for memory in a["kept"].values())


def accounting(runs: Sequence[Run]) -> Html:
    """What every run cost, and in full on request."""
    there = [r for r in runs if r.accounting]
    rows = [[r.name, *(_cost(of, r.accounting) for of in _ACCOUNT.values())] for r in there]
    parts: list[Html] = [table(["run", *_ACCOUNT], rows, sortable=len(rows) > 1)]
    for r in there:
        leaves = [[k, _leaf(v)] for k, v in flatten(r.accounting).items()]
        parts.append(details(f"{r.name}, stage by stage", table(["what", "value"], leaves)))
    text = "Rows go forward and backward; seconds are wall time on the machine of the run."
    return section("Accounting", note(text), *parts, anchor="accounting") if there else Html("")


def _cost(of: Callable[[dict[str, Any]], Any], account: dict[str, Any]) -> Html:
    try:
        value = of(account)
    except (KeyError, TypeError, AttributeError):  # an older run did not count this
        value = None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return cell(None, why="not counted")
    return cell(value, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")


def configs(runs: Sequence[Run]) -> Html:
    """What differs between the runs' configs, and each config in full on request."""
    parts: list[Html] = []
    if len(runs) > 1:
        rows = [[k, *map(_leaf, values)] for k, values in config_differences(runs)]
        head = ["key", *(r.name for r in runs)]
        parts.append(table(head, rows, sortable=True, cls="tight") if rows else note("The configs are equal."))
    for r in runs:
        if r.config:
            rows = [[k, _leaf(v)] for k, v in flatten(r.config).items()]
            parts.append(details(f"Config of {r.name}", table(["key", "value"], rows)))
    title = "What differs between the configs" if len(runs) > 1 else "Config"
    return section(title, *parts, anchor="configs") if parts else Html("")


def _leaf(v: Any) -> Html:
    if v is None or v == {} or v == []:
        return DASH
    if isinstance(v, float):
        return esc(f"{v:.6g}")
    return esc(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))
