"""jaxcl bench: what methods cost beside a plain step, measured here and now."""

from __future__ import annotations

import json

import click

from jaxcl.cli.terminal import console, plain_table


@click.command()
@click.option("--method", "methods", metavar="NAME", multiple=True, help="This method only; may be given again.")
@click.option("--base", "bases", metavar="full|lora|'lora q v'", multiple=True, help="Beside this plain step only.")
@click.option("--model", default="tiny", show_default=True, help="tiny, or what `jaxcl fetch` knows.")
@click.option("--layers", type=int, help="The model's first layers only.")
@click.option("--rows", type=int, default=8, show_default=True, help="Rows of a batch.")
@click.option("--window", type=int, default=128, show_default=True, help="Tokens of a row.")
@click.option("--targets", type=int, default=8, show_default=True, help="Answer tokens of a row.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Rounds that are counted.")
@click.option("--warm", type=int, default=2, show_default=True, help="Rounds before them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with memory and all settings.")
def bench(
    methods: tuple[str, ...],
    bases: tuple[str, ...],
    model: str,
    layers: int | None,
    rows: int,
    window: int,
    targets: int,
    rounds: int,
    warm: int,
    as_json: bool,
) -> None:
    """Time methods' steps beside plain ones.

    Each method takes turns with full fine-tuning or LoRA in one process, on rows of random ids; the
    ratio is the median over rounds. Steps are built as `jaxcl run` builds them, data pipeline included.
    Without --method all are measured, on the tiny model in about two minutes.

    \b
    Example:
      jaxcl bench --method ewc --method olora
      jaxcl bench --model smollm2-135m-instruct --method lwf --base lora --json
    """
    from jaxcl.errors import RequestError

    if rounds < 1 or warm < 0:
        raise RequestError(f"--rounds is {rounds}, --warm {warm}; accepted: at least 1 and at least 0")
    from jaxcl.bench.measure import document, measured, setting
    from jaxcl.bench.sides import chosen

    wanted = chosen(methods, bases)
    at = setting(model, layers, rows, window, targets)
    say = lambda line: click.echo(line, err=True)  # noqa: E731
    found = list(measured(wanted, at, rounds, warm, say))
    whole = document(model, at, rounds, warm)
    if as_json:
        click.echo(json.dumps({**whole, "sides": found}, indent=1))
        return
    table = [shown(r) for r in found]
    console().print(plain_table(table, list(table[0])))


def shown(r: dict) -> dict:
    """A record as a row of the table; MiB are the compiler's peak of a step, arguments included."""
    mib = lambda key: round(r[key]["peak"] / 2**20) if key in r else None  # noqa: E731
    low, high = r["ratio_range"]
    return {
        "side": r["side"], "beside": r["base"] if r["against"] == "plain" else r["against"],
        "ms": f"{1e3 * r['seconds']:.1f}", "plain ms": f"{1e3 * r['base_seconds']:.1f}", "times": f"{r['ratio']:.3f}",
        "lowest to highest": f"{low:.3f} to {high:.3f}", "by CPU time": f"{r['cpu_ratio']:.3f}",
        "compilations": r.get("compilations"), "MiB": mib("bytes"), "plain MiB": mib("base_bytes"),
    }  # fmt: skip


COMMANDS = (bench,)
