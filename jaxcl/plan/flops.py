"""Floating-point operations of a traced function: matrix products and convolutions, loops times their trips.

Counted in the jaxpr, before any compiler: a layer in a scan counts as often as it runs, what a checkpoint computes
again counts again. Everything elementwise is left out, as in the usual 6N per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def flops(jaxpr: Any) -> int:
    """Operations of a (closed) jaxpr over all devices. Of a conditional the dearest branch counts; a loop whose trips
    are not static (`jax.lax.while_loop`) counts as one."""
    return sum(_of(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _conv(eqn)
    if name == "cond":
        return max(flops(branch) for branch in params["branches"])
    return (params["length"] if name == "scan" else 1) * sum(flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield item


def _dot(eqn: Any) -> int:
    """2 m n k of a product of [.., m, k] and [.., k, n], with its batch axes."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[d] for d in contracted)


def _conv(eqn: Any) -> int:
    """2 per output and kernel entry that meets it."""
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(kernel) // features
