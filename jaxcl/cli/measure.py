"""jaxcl score, report: from a matrix to numbers, from runs to a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from jaxcl.cli.terminal import cell, console, plain_table


@click.command()
@click.argument("matrix", metavar="MATRIX.json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(matrix: str, as_json: bool) -> None:
    """Every metric of an accuracy matrix, by name.

    Each name says its convention. MATRIX.json may also be a run directory; its predictions then give
    intervals.

    \b
    Example:
      jaxcl score runs/first/matrix.json --json
    """
    from jaxcl.metrics.matrix_file import read_matrix
    from jaxcl.metrics.score import score_matrix

    path = Path(matrix)
    document = score_matrix(read_matrix(path), path if path.is_dir() else None)
    if as_json:
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        _print_score(document)


def _print_score(d: dict[str, Any]) -> None:
    out = console()
    if d["partial"]:
        out.print(f"partial: {d['stages_done']} of {d['stages']} stages are done; only their tasks count")
    rows = [
        {"metric": k, "value": m["value"], "95% interval": _interval(m)}
        | {"convention, or why there is no value": m.get("reason") or m["convention"]}
        for k, m in d["metrics"].items()
    ]
    out.print(plain_table(rows, list(rows[0])))
    steps = [{"after each stage": k, "values": [cell(x) for x in v]} for k, v in d["series"].items()]
    out.print(plain_table(steps, ("after each stage", "values")))
    if apart := d["drift"]["evals"]:
        rows = [{"drift of": k, **v} for k, v in apart.items()]
        out.print(plain_table(rows, ("drift of", "role", "before", "after", "delta")))
    out.print(f"scores: {d['sign']}")
    if reason := d.get("intervals", {}).get("reason"):
        out.print(f"no intervals: {reason}")


def _interval(m: dict[str, Any]) -> str | None:
    return f"{m['interval'][0]:.4f} to {m['interval'][1]:.4f}" if "interval" in m else None


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", metavar="DIR", required=True, help="Folder for report.html, metrics.csv, metrics.tex.")
def report(runs: tuple[str, ...], out: str) -> None:
    """One page of one run, or of several side by side.

    Writes report.html, metrics.csv, metrics.tex and a picture of each matrix.

    \b
    Example:
      jaxcl report runs/sequential runs/replay --out reports/both
    """
    from jaxcl.report import report as write_report

    click.echo(f"report: {write_report([Path(r) for r in runs], Path(out))}")


COMMANDS = (score, report)
