"""The chips a step can be planned for, and their topologies as libtpu describes them. No chip need be there.

Numbers are Google's, per chip: https://docs.cloud.google.com/tpu/docs/v5e and its neighbours v4, v5p and v6e. Where the
pages give the interconnect in both directions, half of it is what a chip can send.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from jaxcl.errors import RequestError, RunFailed, needs_extra, unknown


@dataclasses.dataclass(frozen=True)
class Chip:
    """hbm: bytes of memory. flops: peak operations a second in bfloat16. bandwidth: bytes a second to memory. ici:
    bytes a second that it sends to other chips over all its links. axes: of its torus. largest: chips in a slice."""

    name: str
    hbm: float
    flops: float
    bandwidth: float
    ici: float
    axes: int
    largest: int


CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 32 * 2**30, 275e12, 1200e9, 300e9, 3, 4096),
    "v5e": Chip("TPU v5e", 16 * 2**30, 197e12, 819e9, 200e9, 2, 256),
    "v5p": Chip("TPU v5p", 95 * 2**30, 459e12, 2765e9, 600e9, 3, 8960),
    "v6e": Chip("TPU v6e", 32 * 2**30, 918e12, 1638e9, 400e9, 2, 256),
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # an accelerator that is there is left alone
    "TPU_SKIP_MDS_QUERY": "1",  # and the metadata of a cloud machine is not asked for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may plan at once: none of them holds a chip
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program for chips that are not here is never loaded again
}


def parsed(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """(chip, chips along each axis) of ``v5e:4x4``. Imports no jax. RequestError says what is accepted."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise unknown("TPU", kind, CHIPS, where=f"--topology {topology}")
    chip = CHIPS[kind]
    example = f"{kind}:{'x'.join(['4'] * chip.axes)}"
    if not re.fullmatch(r"\d+" + r"x\d+" * (chip.axes - 1), shape):
        raise RequestError(f"--topology {topology}: accepted: {kind}: and {chip.axes} sizes, such as {example}")
    sizes = tuple(map(int, shape.split("x")))
    if not 1 <= math.prod(sizes) <= chip.largest:
        raise RequestError(f"--topology {topology}: {math.prod(sizes)} chips; accepted: 1 to {chip.largest}")
    return chip, sizes


def devices(topology: str) -> list[Any]:
    """The topology's devices, in libtpu's order; ask `prepare` first. RequestError where libtpu has no such slice,
    RunFailed where it does not start."""
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    chip, _ = parsed(topology)
    try:
        with hushed():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except JaxRuntimeError as e:
        even = "x".join(["2"] * 2 + ["1"] * (chip.axes - 2))
        if "INVALID_ARGUMENT" not in str(e):
            raise RunFailed(f"libtpu does not start: {str(e).splitlines()[0]}") from e
        raise RequestError(
            f"--topology {topology}: libtpu knows no such slice ({str(e).splitlines()[0]}); "
            f"accepted: sizes that hosts of {even} chips fill"
        ) from e


def prepare() -> None:
    """Sets what libtpu reads from the environment; before jax is imported. RequestError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise needs_extra("libtpu", "tpu")
    os.environ.update(_ENVIRONMENT)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """What libtpu's C++ writes to standard error in this block goes nowhere."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
