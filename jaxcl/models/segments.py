"""How the layers of a stack are laid out as segments: each on its own key, or several under one that is scanned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

from ..errors import RequestError, unknown

Segments = tuple[tuple[tuple[str, ...], int], ...]


class Run(NamedTuple):
    """One segment, resolved: what stands at each position of its pattern.

    prefixes[j] is the path of position j, ``'layers/7'`` where the segment has one repeat and
    ``'layers/0:30:1'`` where its layers share one stacked key. layers[j] are the layer numbers behind it.
    """

    kinds: tuple[str, ...]
    repeats: int
    prefixes: tuple[str, ...]
    layers: tuple[range, ...]


class Layered:
    """What every spec with ``layers`` and ``segments`` ((kinds of layer, repeats), ...) knows of its layers."""

    layers: int
    segments: Segments
    stacks = ("",)
    """What stands before the paths of the layers, one for every stack of them that the model has."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, in order."""
        return tuple(kind for kinds, repeats in self.segments for kind in kinds * repeats)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The segments in order, with their paths and layer numbers."""
        out, start = [], 0
        for kinds, repeats in self.segments:
            step = len(kinds)
            stop = start + step * repeats
            layers = tuple(range(start + j, stop, step) for j in range(step))
            if repeats == 1:
                prefixes = tuple(f"layers/{r.start}" for r in layers)
            else:
                prefixes = tuple(f"layers/{r.start}:{stop}:{step}" for r in layers)
            out.append(Run(kinds, repeats, prefixes, layers))
            start = stop
        return tuple(out)

    @property
    def blocks(self) -> dict[str, int]:
        """{path of a layer or of a segment's stacked ones, in all stacks: how many layers it holds}."""
        paths = ((prefix, run.repeats) for run in self.runs for prefix in run.prefixes)
        return {stack + prefix: repeats for prefix, repeats in paths for stack in self.stacks}

    @property
    def attentions(self) -> dict[str, int]:
        """The same of the paths at which there is attention."""
        return {f"{path}/attn": repeats for path, repeats in self.blocks.items()}

    def runs_from(self, layer: int) -> tuple[Run, ...]:
        """The segments from a layer on. RequestError where it is inside a stack."""
        left = []
        for run in self.runs:
            first, last = run.layers[0].start, run.layers[-1][-1]
            if first >= layer:
                left.append(run)
            elif last >= layer and run.repeats > 1:
                raise RequestError(f"layer {layer} is in a stack of layers; restack so that it stands alone")
            elif last >= layer:
                rest = slice(layer - first, None)
                left.append(Run(run.kinds[rest], 1, run.prefixes[rest], run.layers[rest]))
        return tuple(left)

    def with_segments(self, segments: Segments) -> Self:
        return dataclasses.replace(self, segments=segments)  # type: ignore[type-var]  # every spec is a dataclass

    @property
    def unstacked(self) -> Segments:
        """Segments that keep every layer under its own key."""
        return ((self.kinds, 1),)


def checked(segments: Sequence, layers: int, known: Sequence[str], where: str) -> Segments:
    """Segments as tuples, every layer a ``'block'`` on its own where there are none. RequestError, naming the model in
    ``where``: a kind that is not among ``known``, another number of layers."""
    if not segments:
        return ((("block",) * layers, 1),)
    made = tuple((tuple(kinds), int(repeats)) for kinds, repeats in segments)
    for kinds, repeats in made:
        for kind in kinds:
            if kind not in known:
                raise unknown("kind of layer", str(kind), known, where=f"{where} segments")
        if not kinds or repeats < 1:
            raise RequestError(f"{where}: segment {(kinds, repeats)!r} is empty; accepted: kinds and repeats")
    total = sum(len(kinds) * repeats for kinds, repeats in made)
    if total != layers:
        raise RequestError(f"{where}: segments hold {total} layers; accepted: exactly {layers}")
    return made
