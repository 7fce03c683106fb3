"""jaxcl demo, run, evaluate: what trains, and what a model does before it is trained."""

from __future__ import annotations

import click

distributed = click.option(
    "--distributed", is_flag=True, envvar="JAXCL_DISTRIBUTED", help="One of several processes (docs/meshes.md)."
)


def join(distributed: bool) -> None:
    """Meets the other processes, where there are some, before anything asks JAX for its devices."""
    if distributed:
        from jaxcl.core import processes

        processes.join()


@click.command()
@click.option("--out", metavar="DIR", help="Where runs and report go.")
def demo(out: str | None) -> int:
    """Several methods on small stages, with a report.

    No download, no data set, a few minutes on two cores.

    \b
    Example:
      jaxcl demo --out runs/demo
    """
    from jaxcl.experiment_files import demo_main

    return demo_main(out)


@click.command()
@click.argument("experiment")
@click.option("--set", "overrides", metavar="A.B=C", multiple=True, help="Change a value of the Config.")
@click.option("--data", metavar="DIR", help="Data directory (default: $JAXCL_DATA).")
@click.option("--out", metavar="DIR", help="Run directory (default: runs/<experiment>/<hash of Config>).")
@click.option(
    "--wandb", metavar="[PROJECT]", is_flag=False, flag_value="jaxcl", help="Send the scalars to Weights & Biases, too."
)
@distributed
@click.pass_obj
def run(
    obj: dict[str, bool],
    experiment: str,
    overrides: tuple[str, ...],
    data: str | None,
    out: str | None,
    wandb: str | None,
    distributed: bool,
) -> int:
    """Run EXPERIMENT, a name or a Python file.

    The same command again resumes, or says that the run is finished. --set may be repeated. --wandb needs
    the extra 'tracking'; WANDB_MODE=offline keeps everything in the run directory. --distributed: the same
    command in every process; only the first writes files.

    \b
    Example:
      jaxcl run olora_order1 --set method=replay --data data
    """
    from jaxcl.experiment_files import find

    find(experiment)  # a misspelt name is answered before jax is imported
    join(distributed)
    from jaxcl.core.run import run_experiment

    return run_experiment(experiment, list(overrides), data, out, obj["debug"], wandb)


@click.command()
@click.argument("experiment")
@click.option("--set", "overrides", metavar="A.B=C", multiple=True, help="Change a value of the Config.")
@click.option("--data", metavar="DIR", help="Data directory (default: $JAXCL_DATA).")
@click.option("--out", metavar="DIR", help="Run directory (default: runs/<experiment>/<hash of Config>-untrained).")
@distributed
def evaluate(
    experiment: str, overrides: tuple[str, ...], data: str | None, out: str | None, distributed: bool
) -> int:
    """Measure EXPERIMENT's model untrained, on all its evals.

    Writes what `run` writes before it trains: matrix.json with row 0 alone, metrics.json and predictions.

    \b
    Example:
      jaxcl evaluate scenario --set stream=intent/clinc150 --set test_rows=100 --data data
    """
    from jaxcl.experiment_files import find

    find(experiment)
    join(distributed)
    from jaxcl.core.zero_shot import evaluate_experiment

    return evaluate_experiment(experiment, list(overrides), data, out)


COMMANDS = (demo, run, evaluate)
