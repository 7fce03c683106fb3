"""Several processes as one run: joining them, and what host code has to ask all of them for.

Every process runs the same program on the same arrays, each of which may be spread over all of them. What is called
"collective" here has to be called by all processes in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.errors import RequestError

_NAMES = ("JAXCL_COORDINATOR", "JAXCL_PROCESS_COUNT", "JAXCL_PROCESS_ID")


def join() -> None:
    """Makes this process one of several, before anything else asks JAX for its devices; on CPU through gloo.

    Where they find each other is in $JAXCL_COORDINATOR (host:port of process 0), $JAXCL_PROCESS_COUNT and
    $JAXCL_PROCESS_ID, all three or none: on TPU, under Slurm and Open MPI JAX knows by itself. Raises RequestError.
    """
    coordinator, count, index = (os.environ.get(name) for name in _NAMES)
    given = [n for n, v in zip(_NAMES, (coordinator, count, index), strict=True) if v]
    if given and len(given) < len(_NAMES):
        missing = ", ".join(n for n in _NAMES if n not in given)
        raise RequestError(f"{', '.join(given)} without {missing}; give all three, or none where JAX knows by itself")
    for name, value in zip(_NAMES[1:], (count, index), strict=True):
        if value and not value.isdigit():
            raise RequestError(f"{name}={value}; accepted: a whole number")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    number = lambda text: int(text) if text else None  # noqa: E731
    try:
        jax.distributed.initialize(coordinator, number(count), number(index))
    except (RuntimeError, ValueError) as e:
        wanted = "give $" + ", $".join(_NAMES)
        raise RequestError(f"no other process can be joined ({str(e).splitlines()[0]}); {wanted}") from e


def host(x: Any) -> np.ndarray:
    """The whole of an array in this process's memory, wherever its parts are. Collective."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree(value: Any) -> Any:
    """Process 0's JSON value, in every process; what the others gave is not looked at. Collective."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, size) if len(text) else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def together(fine: bool = True) -> bool:
    """Waits for all processes; whether all of them are fine. Collective."""
    return fine if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(fine))))


def permitted(*checks: Callable[[], object]) -> None:
    """Calls the checks in every process; where one of them refuses in any process, all raise RequestError instead of
    waiting for it. Collective."""
    try:
        for check in checks:
            check()
    except RequestError:
        together(False)
        raise
    if not together():
        raise RequestError("another process of this run was refused, and says why")
