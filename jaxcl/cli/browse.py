"""jaxcl list, fetch, doctor: what there is, and what this machine has of it."""

from __future__ import annotations

import json
import sys

import click

from jaxcl.cli.terminal import console, plain_table
from jaxcl.errors import unknown


@click.command(name="list")
@click.argument("what", metavar="methods|streams|models|metrics|experiments")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every field of it.")
def list_(what: str, as_json: bool) -> None:
    """List methods, streams, models, metrics or experiments.

    \b
    Example:
      jaxcl list methods --json
    """
    from jaxcl.registry import TABLES

    if what not in TABLES:
        raise unknown("list of things", what, TABLES)
    table = TABLES[what]
    if as_json:
        click.echo(json.dumps(table.rows(), indent=1))
        return
    rows = table.short()
    console().print(plain_table(rows, table.columns or list(dict.fromkeys(k for r in rows for k in r))))


@click.command()
@click.argument("name")
@click.option("--accept-terms", is_flag=True, help="Accept a model's own terms without being asked.")
def fetch(name: str, accept_terms: bool) -> None:
    """Fetch the weights of a model, or a data set tfds:NAME or hf:OWNER/NAME, into their caches.

    Weights are checked against a pinned hash, whether fetched or found. Where
    a model has terms of its own, they are shown and have to be accepted.

    \b
    Example:
      jaxcl fetch smollm2-135m-instruct
      jaxcl fetch tfds:glue/sst2
    """
    if name.startswith(("tfds:", "hf:")):
        from jaxcl.data.named import prepare

        click.echo(f"{name}: {prepare(name)}")
        return
    from jaxcl.models import fetch as weights

    terms = weights.terms(name)
    if terms and (accept_terms or sys.stdin.isatty()):
        click.echo(terms, err=True)
        accept_terms = accept_terms or click.confirm("Do you accept these terms?", err=True)
    click.echo(f"{name}: {weights.fetch(name, accept_terms=accept_terms)}")


@click.command()
def doctor() -> None:
    """Show devices, versions, caches, what is missing.

    \b
    Example:
      jaxcl doctor
    """
    from jaxcl.cli.machine import findings

    console().print(plain_table(list(findings()), ("what", "found", "note")))


COMMANDS = (list_, fetch, doctor)
