"""What a metric is called, what its name means, who uses it and what it needs. Plain data, one row a metric.

A number that can be undefined is a `Found`: the value, or None and the reason. It is never 0 and never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxcl.errors import RequestError

Found = tuple[float | None, str | None]
"""(value, None), or (None, why there is no value)."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """kind: what it is computed from ('matrix', 'nats', 'drift', 'text', 'editing', 'refinement', 'probes',
    'retrieval', 'tools', 'alignment', 'generation'). needs: what must have been measured beside that."""

    name: str
    convention: str
    kind: str
    card: str
    papers: str = ""
    needs: tuple[str, ...] = ()
    lower_is_better: bool = False


def mean(values: Sequence[float] | np.ndarray, what: str) -> float:
    """Mean of numbers that must be there: RequestError where there are none, ``what`` they would be."""
    array = np.asarray(values, np.float64)
    if not array.size:
        raise RequestError(f"no {what}; accepted: at least one")
    return float(array.mean())


def mean_of_found(found: Sequence[Found], what: str) -> Found:
    """Mean over those that are defined; undefined where none is."""
    values = [value for value, _ in found if value is not None]
    return (float(np.mean(values)), None) if values else (None, f"undefined: no {what} is defined")
