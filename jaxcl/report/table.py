"""The comparison table of several runs for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from jaxcl.report.run_files import Run
from jaxcl.report.together import read_runs

COLUMNS = ("aa", "fgt_max", "bwt_over_T_minus_1", "learning_accuracy")


def comparison(runs: Sequence[Path]) -> Table:
    """A rich table with one line a run: AA, forgetting, backward transfer, learning accuracy, each under
    the name of its convention. Raises RequestError when the runs cannot be compared."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    found = read_runs(runs, intervals=False)
    if any(run.score.get("sign", "").startswith("losses") for run in found):
        table.caption = "scores are losses, negated: higher is better"
    for run in found:
        title = Text(run.name)
        if run.state:
            title.append(f" ({run.state})", style="yellow")
        table.add_row(title, *(_value(run, c) for c in COLUMNS))
    return table


def _value(run: Run, metric: str) -> Text:
    value = run.metric(metric)["value"]
    return Text("-" if value is None else f"{value:.3f}")
