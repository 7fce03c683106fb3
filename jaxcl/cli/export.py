"""jaxcl export: a run's model for other programs."""

from __future__ import annotations

import click


@click.command()
@click.argument("run")
@click.option("--format", "style", metavar="hf|peft", required=True, help="A whole model, or the adapters alone.")
@click.option("--out", metavar="DIR", required=True, help="A new directory.")
@click.option("--experiment", metavar="FILE", help="The run's experiment, where it is not found by its name.")
def export(run: str, style: str, out: str, experiment: str | None) -> None:
    """Write what transformers or PEFT can load.

    RUN is a run directory; its last finished stage counts. hf merges adapters into the weights. RUN may also
    be a model's name: its weights as they are, the base of a peft export.

    \b
    Example:
      jaxcl export runs/olora --format peft --out adapters/olora
    """
    from jaxcl.models.export import check

    check(run, style, out)  # a misspelt name is answered before jax is imported
    from jaxcl.models.export import export as write

    for line in write(run, style, out, experiment):
        click.echo(f"note: {line}")
    click.echo(f"exported: {out}")


COMMANDS = (export,)
