"""The command group: unknown commands are answered with the nearest names, every help shows an example."""

from __future__ import annotations

from typing import Any

import click

from jaxcl.cli import bench, browse, export, measure, plan, train
from jaxcl.errors import unknown


class Group(click.Group):
    """A click group whose error for an unknown command is ours."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise unknown("command", name, self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet


@click.group(cls=Group, invoke_without_command=True)
@click.version_option(package_name="jaxcl", message="jaxcl %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Tracebacks and logs; accepted anywhere.")
@click.pass_context
def app(ctx: click.Context) -> Any:
    """Continual learning for large language models: methods as small pure functions that compose.

    \b
    Examples:
      jaxcl demo
      jaxcl run olora_order1 --set seed=1 --out runs/first
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (c for part in (train, browse, measure, export, plan, bench) for c in part.COMMANDS):
    app.add_command(command)
