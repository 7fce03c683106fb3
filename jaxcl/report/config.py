"""The configs of runs: flat, side by side, and what makes two runs repetitions of each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jaxcl.report.run_files import Run

_IDENTITY = ("experiment", "config", "methods", "source")


def flatten(value: Any, at: str = "") -> dict[str, Any]:
    """{dotted path: leaf} of nested JSON; list items that name their stage go by that name."""
    if isinstance(value, dict) and (value or not at):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        items = [_labelled(v, i) for i, v in enumerate(value)]
    else:
        return {at: value}
    return {k: leaf for key, v in items for k, leaf in flatten(v, f"{at}.{key}" if at else key).items()}


def _labelled(item: Any, index: int) -> tuple[str, Any]:
    if not (isinstance(item, dict) and "stage" in item):
        return str(index), item
    return str(item["stage"] or "before training"), {k: v for k, v in item.items() if k != "stage"}


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(dotted key, value in each run) of what is not equal in all of them."""
    flat = [flatten(r.config) for r in runs]
    keys = dict.fromkeys(k for f in flat for k in f)
    rows = [(k, [f.get(k) for f in flat]) for k in keys]
    return [(k, values) for k, values in rows if any(v != values[0] for v in values)]


def repetitions(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups, in order of appearance: those of a group differ in nothing but seed and order of stages.

    What may differ: leaves of the config that are called seed or order (or end with _seed or _order), the hash of
    weights that were made by seed, versions, devices.
    """
    groups: dict[str, list[Run]] = {}
    for r in runs:
        flat = flatten({k: r.config.get(k) for k in _IDENTITY})
        same = {k: v for k, v in flat.items() if not _repeats(k)}
        stages = sorted((s.name, s.evals) for s in r.matrix.stages)
        groups.setdefault(json.dumps([same, stages], sort_keys=True), []).append(r)
    return list(groups.values())


def _repeats(key: str) -> bool:
    last = key.rsplit(".", 1)[-1]
    return last in ("seed", "order") or last.endswith(("_seed", "_order")) or key.startswith("source.sha256")


def seed_of(r: Run) -> Any:
    """The seed as config.json has it, else None."""
    inner = r.config.get("config")
    return r.config.get("seed", inner.get("seed") if isinstance(inner, dict) else None)
