"""A layer taken out of its stack, as a surgery: the same numbers under other keys, and every memory follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcl.core.paths import is_stacked
from jaxcl.core.types import World
from jaxcl.models.spec import DecoderSpec, Segments
from jaxcl.models.stacking import restack
from jaxcl.surgery.edit import Edit, Origin, operated


def apart(world: World, layer: int) -> World:
    """The world in which ``layer`` has keys of its own; what is left of its stack stays stacked on both sides of it.

    Keys keep their owners. The world itself where the layer stands alone already.
    """
    spec, params = world.spec, world.params
    segments = around(spec, layer)
    if segments == spec.segments:
        return world
    places: list[tuple[str, int | None]] = []  # of every layer's tensor: its key and its row of the stack
    marks: dict[str, Any] = {}
    for path, leaf in params.items():
        here = [(path, row) for row in range(len(leaf))] if is_stacked(path) else [(path, None)]
        numbers = np.arange(len(places), len(places) + len(here))
        places += here
        marks[path] = numbers if is_stacked(path) else numbers[0]
    relabelled, target = restack(marks, spec, segments)
    moved = {}
    for path, numbers in relabelled.items():
        if path not in params:
            parts = tuple(places[int(i)] for i in np.atleast_1d(numbers))
            old = parts[0][0]
            moved[path] = Origin(parts, params[old].ndim - is_stacked(old), stacked=is_stacked(path))
    return operated(world, target, Edit(moved=moved))


def around(spec: DecoderSpec, layer: int) -> Segments:
    """The segments of ``spec`` with a stack that holds ``layer`` cut before and after it."""
    segments: list[Any] = []
    start = 0
    for kinds, repeats in spec.segments:
        before, size = (layer - start) // len(kinds), len(kinds) * repeats
        inside = repeats > 1 and start <= layer < start + size
        segments += [(kinds, n) for n in ((before, 1, repeats - before - 1) if inside else (repeats,)) if n]
        start += size
    return tuple(segments)
