"""jaxcl score, report: from a matrix to numbers, from runs to a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from jaxcl.cli.terminal import cell, console, plain_table


@click.command()
@click.argument("runs", metavar="MATRIX.json...", nargs=-1, required=True)
@click.option("--metric", "names", metavar="NAME", multiple=True, help="This metric only; may be given again.")
@click.option("--one-scale", is_flag=True, help="Scores as shares of their evals' ranges.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(runs: tuple[str, ...], names: tuple[str, ...], one_scale: bool, as_json: bool) -> None:
    """Every metric of an accuracy matrix, by name.

    Each name says its convention, and who uses it stands beside it.
    MATRIX.json may also be a run directory; its predictions then give
    intervals. Several runs of one stream (other seeds, other orders) also
    give mean and sample deviation over runs.

    \b
    Example:
      jaxcl score runs/first/matrix.json --json
      jaxcl score runs/seed0 runs/seed1 runs/seed2
    """
    from jaxcl.metrics.over_runs import score_run, score_runs

    paths = [Path(run) for run in runs]
    document = score_runs(paths, names, one_scale) if len(paths) > 1 else score_run(paths[0], names, one_scale)
    if as_json:
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    elif len(paths) > 1:
        _print_runs(document)
    else:
        _print_score(document)


def _print_score(d: dict[str, Any]) -> None:
    out = console()
    _print_partial(d)
    rows = [
        {"metric": k, "value": m["value"], "95% interval": _interval(m), "used by": m["papers"]}
        | {"convention, or why there is no value": m.get("reason") or m["convention"]}
        for k, m in d["metrics"].items()
    ]
    if rows:
        out.print(plain_table(rows, list(rows[0])))
    steps = [{"after each stage": k, "values": [cell(x) for x in v]} for k, v in d["series"].items()]
    if steps:
        out.print(plain_table(steps, ("after each stage", "values")))
    if apart := d["drift"]["evals"]:
        rows = [{"drift of": k, **v} for k, v in apart.items()]
        rows += [
            {"drift of": " ".join([m.get("name", f"all of role {role}"), m.get("papers", "")]), "role": role}
            | {"delta": m["value"], "note": m.get("reason") or _left_out(m)}
            for role, m in d["drift"]["mean_delta"].items()
        ]
        out.print(plain_table(rows, ("drift of", "role", "before", "after", "delta", "note")))
    out.print(f"scores: {d['sign']}")
    if reason := d.get("intervals", {}).get("reason"):
        out.print(f"no intervals: {reason}")


def _left_out(m: dict[str, Any]) -> str | None:
    return "without " + ", ".join(m["left_out"]) if "left_out" in m else None


def _print_partial(d: dict[str, Any]) -> None:
    if d["partial"]:
        run = f"{d['path']}: " if "path" in d else ""
        console().print(f"{run}partial: {d['stages_done']} of {d['stages']} stages are done; only their tasks count")


def _print_runs(d: dict[str, Any]) -> None:
    """A metric a row: over the runs, then run by run in their order."""
    out = console()
    for number, run in enumerate(d["runs"], 1):
        _print_partial(run)
        out.print(f"run {number}: {run['path']}")
    for key, values in d["differences"].items():
        out.print(f"{key}, run by run: {', '.join(map(str, values))}")
    rows = [
        m | {"metric": name, "run by run": [cell(x) for x in m["values"]], "used by": m["papers"]}
        | {"convention, or why there is no mean": m.get("reason") or m["convention"]}
        for name, m in d["mean_and_deviation"].items()
    ]
    columns = ("metric", "mean", "deviation", "n", "run by run", "used by", "convention, or why there is no mean")
    out.print(plain_table(rows, columns))


def _interval(m: dict[str, Any]) -> str | None:
    return f"{m['interval'][0]:.4f} to {m['interval'][1]:.4f}" if "interval" in m else None


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", metavar="DIR", required=True, help="Folder for the page, the tables and the pictures.")
@click.option("--one-scale", is_flag=True, help="Metrics of scores as shares of their evals' ranges.")
def report(runs: tuple[str, ...], out: str, one_scale: bool) -> None:
    """One page of one run, or of several side by side.

    Writes report.html, which needs no network, the numbers as CSV and LaTeX, the matrices as PNG and SVG.
    Runs that differ in seed or order are averaged; joint and single-task runs become baselines.

    \b
    Example:
      jaxcl report runs/sequential runs/replay --out reports/both
    """
    from jaxcl.report import report as write_report

    click.echo(f"report: {write_report([Path(r) for r in runs], Path(out), one_scale=one_scale)}")


COMMANDS = (score, report)
