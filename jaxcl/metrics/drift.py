"""What became of everything that no stage teaches: general ability, instruction following, safety, probes.

The last row minus row 0, for each eval and as a mean by role, which is TRACE's way (`jaxcl.metrics.trace.DELTAS`). A
positive delta is an improvement, for losses too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcl.metrics.matrix_file import Matrix
from jaxcl.metrics.trace import DELTAS


def drift(m: Matrix) -> dict[str, Any]:
    """{"evals": {id: {"role", "before", "after", "delta"[, "relative_perplexity"]}}, "mean_delta": {role: {"value"[,
    "reason"][, "left_out"], "name", "convention", "papers"}}, "per_stage": {role: [mean delta after each stage]}}.

    Null is what was not measured. A mean has a reason where the scales differ or a value is missing. Beside scores,
    losses are left out of it by name: a benchmark's share and a corpus's nats have no common mean.
    """
    apart = [i for i, e in enumerate(m.evals) if m.learned(e.id) is None]
    change = np.where([e.higher_is_better for e in m.evals], 1, -1) * (m.rows - m.row0)
    out: dict[str, Any] = {"evals": {m.evals[i].id: _entry(m, i) for i in apart}, "mean_delta": {}, "per_stage": {}}
    for role in sorted({m.evals[i].role for i in apart}):
        group = [i for i in apart if m.evals[i].role == role]
        averaged = [i for i in group if m.evals[i].higher_is_better] or group
        found = _mean(m, averaged, change[:, averaged])
        if left_out := [m.evals[i].id for i in group if i not in averaged]:
            found["left_out"] = left_out
        if "reason" not in found:
            out["per_stage"][role] = [_plain(v) for v in change[:, averaged].mean(1)]
        if info := DELTAS.get(role):
            found |= {"name": info.name, "convention": info.convention, "papers": info.papers}
        out["mean_delta"][role] = found
    return out


def _entry(m: Matrix, i: int) -> dict[str, Any]:
    e, before, after = m.evals[i], m.row0[i], m.rows[-1, i] if len(m.rows) else np.nan
    entry = {"before": before, "after": after, "delta": (after - before) * (1 if e.higher_is_better else -1)}
    if e.metric in ("nll", "perplexity"):
        entry["relative_perplexity"] = np.exp(after - before) if e.metric == "nll" else after / before
    return {"role": e.role} | {name: _plain(value) for name, value in entry.items()}


def _mean(m: Matrix, group: list[int], change: np.ndarray) -> dict[str, Any]:
    if len({(m.evals[i].higher_is_better, m.evals[i].range) for i in group}) > 1:
        return {"value": None, "reason": "evals of different scale"}
    if len(group) > 1 and any(m.evals[i].metric == "perplexity" for i in group):
        return {"value": None, "reason": "perplexities are not averaged; relative_perplexity is given for each"}
    if not len(change) or np.isnan(change[-1]).any():
        return {"value": None, "reason": "needs row0 and the last row of every eval"}
    return {"value": float(change[-1].mean())}


def _plain(x: float) -> float | None:
    """NaN is what was not measured."""
    return None if np.isnan(x) else float(x)
