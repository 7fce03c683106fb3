"""jaxcl plan: what a step needs on chips that are not here."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.argument("experiment")
@click.option("--topology", metavar="CHIP:SHAPE", required=True, help="Such as v5e:4x4 or v5p:8x8x16.")
@click.option("--set", "overrides", metavar="A.B=C", multiple=True, help="Change a value of the Config.")
@click.option("--data", metavar="DIR", help="Data directory (default: $JAXCL_DATA).")
@click.option("--stage", type=int, help="Whose step, from 0 (default: the second, where memories exist).")
@click.option("--suggest", is_flag=True, help="Where it does not fit, compile with changes until it does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every field of it.")
def plan(
    experiment: str,
    topology: str,
    overrides: tuple[str, ...],
    data: str | None,
    stage: int | None,
    suggest: bool,
    as_json: bool,
) -> None:
    """Compile EXPERIMENT's step for a TPU topology that is not here.

    Memory, FLOPs, messages between chips and the least time of a step. No TPU,
    and no memory for the weights, is needed; the extra 'tpu' is. An experiment
    that reads data or weights needs them here, too.

    \b
    Example:
      jaxcl plan scale --topology v5e:16x16 --set method=ewc --suggest
    """
    from jaxcl.experiment_files import find
    from jaxcl.plan import chips

    find(experiment)
    chips.parsed(topology)
    chips.prepare()  # before jax is imported
    from jaxcl.plan.command import planned
    from jaxcl.plan.show import shown

    def say(line: str) -> None:
        if sys.stderr.isatty():  # elsewhere standard error is for errors
            click.echo(line, err=True)

    found = planned(experiment, overrides, topology, data, stage, suggest, say)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        shown(found)


COMMANDS = (plan,)
