"""`jaxcl report`: everything is computed first, then written, so that a bad request leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxcl.errors import RequestError
from jaxcl.report import sections
from jaxcl.report.exports import metrics_csv, metrics_tex
from jaxcl.report.figures import matrix_png
from jaxcl.report.html import page, tag
from jaxcl.report.run_files import Run, read_runs


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes report.html, metrics.csv, metrics.tex and matrix-<run>.png of run directories; returns the page.

    Unfinished runs are reported as partial. Raises RequestError when a run is absent or malformed, when
    the runs differ in stages or evals, and when the files cannot be written.
    """
    if not runs:
        raise RequestError("no runs; accepted: at least one run directory")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; accepted: a directory")
    read = read_runs([Path(r) for r in runs])
    files: dict[str, bytes] = {
        "report.html": render(read).encode("utf-8"),
        "metrics.csv": metrics_csv(read).encode("utf-8"),
        "metrics.tex": metrics_tex(read).encode("utf-8"),
    }
    for run in read:
        if run.measured:
            files[f"matrix-{re.sub(r'[^A-Za-z0-9._-]+', '-', run.name)}.png"] = matrix_png(run.matrix)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _replace(out / name, content)
    except OSError as e:
        raise RequestError(f"cannot write to --out {out}: {e.strerror}") from e
    return out / "report.html"


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].name
    streams = [" → ".join(s.name for s in r.matrix.stages) for r in runs if r.measured]
    stream = streams[0] if streams else "nothing evaluated yet"
    unfinished = [r for r in runs if r.state]
    parts = [tag("h1", f"jaxcl report: {title}"), tag("p", f"Stages: {stream}", cls="note")]
    if unfinished:
        text = "; ".join(f"{r.name}: {r.state}" for r in unfinished)
        parts.append(tag("p", f"Not finished. {text}. Only tasks seen so far count.", cls="partial"))
    parts.append(sections.summary(runs))
    parts += [sections.paired(runs)] if several else []
    parts += [sections.progress(runs), *map(sections.one_run, runs)]
    parts += [sections.configs(runs)] if several else []
    parts.append(sections.conventions())
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return page(f"jaxcl report: {title}", style, *parts)


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
