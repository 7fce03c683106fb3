"""`jaxcl report`: everything is computed first, then written, so that a bad request leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxcl.errors import RequestError
from jaxcl.report import curves, exports, sections
from jaxcl.report.bounds import with_bounds
from jaxcl.report.figures import curves_figure, matrix_figure
from jaxcl.report.heat import scales
from jaxcl.report.html import Html, page, tag
from jaxcl.report.run_files import Run
from jaxcl.report.together import read_runs


def report(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, one_scale: bool = False
) -> Path:
    """Writes report.html, metrics.csv, matrix.csv, groups.csv (where runs repeat each other), metrics.tex, and of each
    run matrix-<run>.tex, .png and .svg, of all together averages.png and .svg; returns the page.

    one_scale: metrics are computed of scores as shares of their evals' ranges, then without intervals; the matrices
    stay as measured. Unfinished runs are reported as partial. Raises RequestError when a run is absent or malformed,
    when the runs do not belong to one stream, and when the files cannot be written.
    """
    if not runs:
        raise RequestError("no runs; accepted: at least one run directory")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; accepted: a directory")
    read = with_bounds(read_runs([Path(r) for r in runs], one_scale=one_scale))
    files = {name: text.encode("utf-8") for name, text in _texts(read).items()} | _pictures(read)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _replace(out / name, content)
    except OSError as e:
        raise RequestError(f"cannot write to --out {out}: {e.strerror}") from e
    return out / "report.html"


def _texts(runs: Sequence[Run]) -> dict[str, str]:
    out = {
        "report.html": render(runs),
        "metrics.csv": exports.metrics_csv(runs),
        "matrix.csv": exports.matrix_csv(runs),
        "metrics.tex": exports.metrics_tex(runs),
    }
    if exports.groups(runs):
        out["groups.csv"] = exports.groups_csv(runs)
    return out | {f"matrix-{_file(r)}.tex": exports.matrix_tex(r.matrix) for r in runs if r.measured}


def _pictures(runs: Sequence[Run]) -> dict[str, bytes]:
    among = scales([r.matrix for r in runs if r.measured])
    drawn = {f"matrix-{_file(r)}": matrix_figure(r.matrix, among) for r in runs if r.measured}
    series = {r.name: [v for v in r.score["series"].get("aa", []) if v is not None] for r in runs if r.whole}
    if max(map(len, series.values()), default=0) > 1:
        look = curves.looks(runs)
        ticks = curves.stage_ticks([r for r in runs if r.whole])[1:]
        lines = {name: (values, look[name]) for name, values in series.items()}
        drawn["averages"] = curves_figure(lines, ticks=ticks, x="after stage", y="AA")
    return {f"{name}.{kind}": content for name, files in drawn.items() for kind, content in files.items()}


def _file(r: Run) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", r.name)


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].name
    parts = [tag("h1", f"jaxcl report: {title}"), *_streams(runs)]
    if unfinished := [r for r in runs if r.state]:
        text = "; ".join(f"{r.name}: {r.state}" for r in unfinished)
        parts.append(tag("p", f"{text}. Only tasks seen so far count.", cls="partial"))
    draw = (
        *(sections.summary, sections.repeated, sections.paired, sections.matrices, sections.evals),
        *(curves.averages, curves.tasks, curves.drift, curves.learning),
        *(sections.metrics, sections.accounting, sections.configs),
    )
    body = [part(runs) for part in draw]
    here = Path(__file__)
    style = here.with_name("style.css").read_text(encoding="utf-8")
    script = here.with_name("report.js").read_text(encoding="utf-8")
    return page(f"jaxcl report: {title}", style, script, *parts, _contents(body), *body)


def _streams(runs: Sequence[Run]) -> list[Html]:
    """The stages in order; where runs differ in it, every order with its runs."""
    orders: dict[str, list[str]] = {}
    for r in runs:
        if r.whole:
            orders.setdefault(" → ".join(s.name for s in r.matrix.stages), []).append(r.name)
    if not orders:
        return [tag("p", "Stages: nothing evaluated yet", cls="note")]
    whose = [f" ({', '.join(names)})" if len(orders) > 1 else "" for names in orders.values()]
    return [tag("p", f"Stages: {stages}{names}", cls="note") for stages, names in zip(orders, whose)]


def _contents(body: Sequence[Html]) -> Html:
    """Links to the sections that the page has."""
    found = [re.match(r'<section id="([a-z]+)"><h2>([^<]*)</h2>', part) for part in body]
    return tag("nav", *(tag("a", Html(m[2]), href=f"#{m[1]}") for m in found if m), aria_label="contents")


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
