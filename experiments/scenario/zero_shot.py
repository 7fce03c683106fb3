"""What a model does on every stream before it learns any of it, with intervals: the table of this folder's README.

    python experiments/scenario/zero_shot.py --test-rows 24 --out runs/zero_shot
    python experiments/scenario/zero_shot.py --test-rows 24 --out runs/zero_shot ner/types tools/glaive

Each stream is a run directory of `jaxcl evaluate`; one that is there already is only printed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from jaxcl.core.zero_shot import evaluate
from jaxcl.metrics.bootstrap import RESAMPLES, SEED, resampled_sums
from jaxcl.metrics.matrix_file import Eval, read_matrix
from jaxcl.metrics.pooling import pool_named
from jaxcl.metrics.predictions import read_items
from jaxcl.models.decoder import decoder
from jaxcl.models.fetch import load
from jaxcl.models.stacking import restack
from jaxcl.scenarios import STREAMS

HERE = Path(__file__).resolve().parent


def representatives() -> list[str]:
    """Streams with test rows of their own; of those that only order or cut the same data in other ways, the longest."""
    longest = sorted(STREAMS, key=lambda name: -len(STREAMS[name].stages))
    chosen = {(STREAMS[name].data, STREAMS[name].metric): name for name in reversed(longest)}
    return [name for name in STREAMS if name in chosen.values()]


def stacked(model: Any, params: Any, tokenizer: Any, source: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """What `load` gives, its layers in one stack where they are alike: a few rows of many shapes are compiled for
    longer than they run, and a scan compiles several times as fast."""
    kinds = set(model.spec.kinds)
    if len(kinds) == 1:
        params, spec = restack(params, model.spec, ((tuple(kinds), len(model.spec.kinds)),))
        model = decoder(spec)
    return model, params, tokenizer, source


def interval(run: Path, e: Eval, column: int) -> tuple[float, float] | None:
    """95% percentile interval of row 0 over the test items."""
    items = read_items(run, e, 1)
    if items is None:
        return None
    sums = resampled_sums(items.parts, RESAMPLES, np.random.default_rng([SEED, column]))
    values = pool_named(e.pool)(sums)[:, 0]
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def lines(name: str, run: Path) -> list[str]:
    """A line of the table for every eval of a stream that is asked before any training."""
    matrix = read_matrix(run)
    out = []
    for i, (e, value) in enumerate(zip(matrix.evals, matrix.row0)):
        if np.isnan(value):
            continue
        between = interval(run, e, i)
        shown = f"{value:.3f}"
        shown += f" [{between[0]:.3f}, {between[1]:.3f}]" if between else ""
        chance = "" if matrix.random is None or np.isnan(matrix.random[i]) else f"{matrix.random[i]:.3f}"
        out.append(f"| {name} | {e.id} | {e.role} | {e.metric} | {e.n} | {shown} | {chance} |")
    return out


@click.command()
@click.argument("streams", nargs=-1)
@click.option("--test-rows", default=24, show_default=True, help="Rows of each eval, drawn by seed 0.")
@click.option("--general", default=24, show_default=True, help="Rows of each general-ability set; 0: none.")
@click.option("--window", default=512, show_default=True)
@click.option("--template", default="plain", show_default=True)
@click.option("--model", default="smollm2-135m-instruct", show_default=True)
@click.option("--out", default="runs/zero_shot", show_default=True)
def main(streams: tuple[str, ...], test_rows: int, general: int, window: int, template: str, model: str, out: str):
    found = importlib.util.spec_from_file_location("scenario", HERE / "experiment.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["scenario"] = module
    found.loader.exec_module(module)
    loaded = stacked(*load(model))
    module.load = lambda name: loaded  # the weights are read once
    print("| stream | eval | role | metric | items | value | chance |\n| --- | --- | --- | --- | --- | --- | --- |")
    for n, name in enumerate(streams or representatives()):
        run = Path(out) / name.replace("/", "-")
        cfg = module.Config(
            stream=name, model=model, rows=64, test_rows=test_rows, window=window, template=template,
            general=general if general and n == 0 else None,
        )  # fmt: skip
        if not (run / "metrics.json").exists():
            evaluate(module.build(cfg), run, name="scenario", config=json.loads(json.dumps(dataclasses.asdict(cfg))))
        print("\n".join(lines(name, run)), flush=True)


if __name__ == "__main__":
    main()
