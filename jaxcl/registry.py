"""The tables behind `jaxcl list`, and names -> constructors. Importing this module imports neither jax nor
any method: what a method fills in (slots, keeps, packs) is read off the constructed method when asked for."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.errors import unknown

Row = dict[str, Any]
_ER = "Chaudhry et al. 2019, arXiv 1902.10486"
_LORA = "Hu et al. 2022, arXiv 2106.09685"
_STATIC = (  # name, kind, group, card, paper
    ("finetune", "baseline", "baseline", None, "sequential fine-tuning, the lower bound"),
    ("joint", "baseline", "baseline", None, "all stages so far at once, the upper bound"),
    ("replay", "method", "replay", "cft/experience-replay", _ER),
    (
        "generative_replay",
        "method",
        "replay",
        "cft/generative-replay",
        "Shin et al. 2017, arXiv 1705.08690",
    ),
    ("lamol", "method", "replay", "cft/lamol", "Sun et al. 2020, arXiv 1909.03329"),
    ("mir", "method", "replay", "cft/mir", "Aljundi et al. 2019, arXiv 1908.04742"),
    ("der", "method", "replay", "cft/knowledge-distillation-lwf", "Buzzega et al. 2020, arXiv 2004.07211"),
    ("l2_sp", "method", "regularization", "cft/l2-sp", "Li et al. 2018, arXiv 1802.01483"),
    ("ewc", "method", "regularization", "cft/ewc", "Kirkpatrick et al. 2017, arXiv 1612.00796"),
    ("si", "method", "regularization", "cft/si", "Zenke et al. 2017, arXiv 1703.04200"),
    ("mas", "method", "regularization", "cft/mas", "Aljundi et al. 2018, arXiv 1711.09601"),
    ("lwf", "method", "distillation", "cft/knowledge-distillation-lwf", "Li and Hoiem 2016, arXiv 1606.09282"),
    (
        "feature_reg",
        "method",
        "distillation",
        "cft/feature-regularization",
        "Wang et al. 2023, arXiv 2305.06616",
    ),
    ("idbr", "method", "distillation", "cft/feature-regularization", "Huang et al. 2021, arXiv 2104.05489"),
    ("agem", "method", "gradients", "cft/a-gem", "Chaudhry et al. 2019, arXiv 1812.00420"),
    ("gem", "method", "gradients", "cft/gem", "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"),
    ("ogd", "method", "gradients", "cft/ogd", "Farajtabar et al. 2020, arXiv 1910.07104"),
    ("hat", "method", "masks", "cft/hat", "Serra et al. 2018, arXiv 1801.01423"),
    ("rho1", "method", "selection", "cpt/rho-1", "Lin et al. 2024, arXiv 2404.07965"),
    ("lora", "method", "adapters", "cft/lora", _LORA),
    ("inclora", "method", "adapters", "cft/lora", _LORA + "; a fresh adapter per stage"),
    ("olora", "method", "adapters", "cft/o-lora", "Wang et al. 2023, arXiv 2310.14152"),
    ("inflora", "method", "adapters", "cft/inflora", "Liang and Li 2024, arXiv 2404.00228"),
    ("ia3", "method", "adapters", "cft/ia3", "Liu et al. 2022, arXiv 2205.05638"),
    ("prompt_tuning", "method", "adapters", "cft/prompt-tuning", "Lester et al. 2021, arXiv 2104.08691"),
    ("prefix_tuning", "method", "adapters", "cft/prefix-tuning", "Li and Liang 2021, arXiv 2101.00190"),
    (
        "progressive_prompts",
        "method",
        "adapters",
        "cft/progressive-prompts",
        "Razdaibiedina et al. 2023, arXiv 2301.12314",
    ),
    ("bottleneck", "method", "adapters", "cft/bottleneck-adapters", "Houlsby et al. 2019, arXiv 1902.00751"),
    ("lora_experts", "method", "adapters", "cft/moe-adapters-lora-experts", "Dou et al. 2024, arXiv 2312.09979"),
    ("llama_pro", "method", "architecture", "cpt/llama-pro", "Wu et al. 2024, arXiv 2401.02415"),
    ("elle", "method", "architecture", "cpt/elle", "Qin et al. 2022, arXiv 2203.06311"),
    ("ppo", "method", "alignment", "refine-align/rlhf-pieces", "Schulman et al. 2017, arXiv 1707.06347"),
    ("grpo", "method", "alignment", "refine-align/rlhf-pieces", "Shao et al. 2024, arXiv 2402.03300"),
    ("grace", "method", "editing", "refine-align/grace", "Hartvigsen et al. 2023, arXiv 2211.11031"),
    ("rewarm", "transform", "optimizer", "cpt/rewarm-gupta", "Gupta et al. 2023, arXiv 2308.04014"),
    (
        "infinite",
        "transform",
        "optimizer",
        "cpt/ibrahim-rewarm-redecay-replay",
        "Ibrahim et al. 2024, arXiv 2403.08763",
    ),
    ("mofo", "transform", "optimizer", "cft/mofo", "Chen et al. 2024, arXiv 2407.20999"),
)
METHODS: dict[str, Row] = {
    name: {
        "name": name,
        "kind": kind,
        "group": group,
        "card": card,
        "paper": paper,
        "module": f"jaxcl.{'transforms' if kind == 'transform' else 'methods'}.{name}",
    }
    for name, kind, group, card, paper in _STATIC
}


def constructor(name: str, *, where: str = "") -> Callable[..., Any]:
    """The constructor of a method or transform by name (imports jax). Raises RequestError if unknown."""
    if name not in METHODS:
        raise unknown("method", name, METHODS, where=where)
    return getattr(importlib.import_module(METHODS[name]["module"]), name)


def _described(row: Row) -> Row:
    made = constructor(row["name"])()
    if row["kind"] == "transform":  # an optax transform: all it touches is the update
        return row | {"slots": ["tx"], "keeps": "nothing", "packs": True}
    return row | {"slots": list(made.slots), "keeps": str(made.keeps), "packs": made.packs}


def _methods() -> list[Row]:
    return [_described(row) for row in METHODS.values()]


def _streams() -> list[Row]:
    from jaxcl.scenarios import STREAMS

    return _named(STREAMS)


def _short_streams() -> list[Row]:
    """For a terminal: of many stages the number, the first and the last."""
    rows = [(r, r["stages"]) for r in _streams()]
    return [r if len(s) <= 5 else r | {"stages": f"{len(s)}: {s[0]} .. {s[-1]}"} for r, s in rows]


def _models() -> list[Row]:
    from jaxcl.models.known import MODELS, ON_HUB

    return _named({**MODELS, **ON_HUB})


def _metrics() -> list[Row]:
    from jaxcl.metrics.table import METRICS

    return [dataclasses.asdict(info) for info in METRICS.values()]


def _named(table: Mapping[str, Any]) -> list[Row]:
    """Rows of a mapping name -> record (dataclass, named tuple or mapping), plain values only."""
    rows = []
    for name, record in table.items():
        if dataclasses.is_dataclass(record) and not isinstance(record, type):
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        else:
            fields = dict(record._asdict() if hasattr(record, "_asdict") else record)
        plain = {k: _plain(v) for k, v in fields.items() if not callable(v)}
        rows.append({"name": name} | plain)
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _experiments() -> list[Row]:
    from jaxcl.experiment_files import known

    rows = []
    for name, file in known().items():
        about = _about(file)
        if about is not None:
            rows.append({"name": name, "about": about, "file": file.name})
    return rows


def _about(file: Path) -> str | None:
    """First paragraph of an experiment's docstring; None for files that define no ``Config`` and ``build``.
    The file is parsed, not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return None
    names = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    text = ast.get_docstring(tree) or ""
    return " ".join(text.split("\n\n")[0].split()) if {"Config", "build"} <= names else None


class Table(NamedTuple):
    """rows: every field, may import jax. short: what the plain table needs. columns: of the plain table
    (None: every field)."""

    rows: Callable[[], list[Row]]
    short: Callable[[], list[Row]]
    columns: tuple[str, ...] | None


TABLES: dict[str, Table] = {
    "methods": Table(_methods, lambda: list(METHODS.values()), ("name", "kind", "group", "card", "paper")),
    "streams": Table(_streams, _short_streams, ("name", "scenario", "stages", "metric", "regime", "card")),
    "models": Table(_models, _models, ("name", "size", "license", "hub", "wheel")),
    "metrics": Table(_metrics, _metrics, ("name", "kind", "convention", "papers")),
    "experiments": Table(_experiments, _experiments, ("name", "about")),
}
