"""All metrics in one table: what `jaxcl list metrics` shows, and the refusal of one that a stream cannot have."""

from __future__ import annotations

from collections.abc import Collection

from jaxcl.errors import RequestError, nearest, unknown
from jaxcl.metrics import alignment, cmr, editing_names, fuar, repetition, retrieval, tools, trace
from jaxcl.metrics.info import Info
from jaxcl.metrics.matrix import METRICS as MATRIX
from jaxcl.metrics.matrix import MetricInfo
from jaxcl.metrics.nats import NATS
from jaxcl.metrics.text import TEXT_METRICS, TextMetric

KINDS = {
    "matrix": "an accuracy matrix: tasks, each taught by a stage",
    "nats": "task evals whose metric is nll, or perplexity",
    "drift": "evals that no stage teaches",
    "text": "written answers",
    "editing": "edits",
    "refinement": "a refinement stream",
    "probes": "probes of facts",
    "retrieval": "ranked documents",
    "tools": "tool calls",
    "alignment": "rewards or preferences",
    "generation": "written text",
}
"""What a metric of each kind is computed from."""
_MODULES = (editing_names, cmr, fuar, retrieval, tools, alignment, repetition)


def _info(m: MetricInfo | TextMetric) -> Info:
    return Info(name=m.name, convention=m.convention, kind=m.kind, card=m.card, papers=m.papers, needs=m.needs,
                lower_is_better=m.lower_is_better)  # fmt: skip


METRICS: dict[str, Info] = {
    info.name: info
    for group in (
        map(_info, MATRIX.values()),
        map(_info, NATS.values()),
        (*trace.DELTAS.values(), *trace.INFO),
        map(_info, TEXT_METRICS.values()),
        *(module.INFO for module in _MODULES),
    )
    for info in group
}


def required(name: str, has: Collection[str], where: str) -> Info:
    """The row of a metric that ``where`` (a stream, a run) has, ``has`` being all those it has. RequestError for a name
    that nobody knows, and for a metric that ``where`` cannot have, with what that needs."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    info = METRICS[name]
    if name not in has:
        needs = "; ".join([KINDS[info.kind], *info.needs])
        raise RequestError(f"metric {name!r} needs {needs}; {where} has none of that; {nearest(name, has)}")
    return info
