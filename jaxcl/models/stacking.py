"""`restack`: the same numbers under other keys, when the layers' segments change.

A stacked key holds several layers along a leading axis and names them with a slice
(``layers/0:30:1/attn/q/kernel``). Weights, moments, Fisher and anchors are all dicts of parameter paths, so
one relabelling serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import RequestError, unknown
from .segments import Layered, Segments

S = TypeVar("S", bound=Layered)
LAYER = re.compile(r"^(?P<head>(?:.*/)?layers)/(?P<at>\d+(?::\d+:\d+)?)/(?P<rest>.+)$")


def restack(
    tree: Mapping[str, Any], spec: S, segments: Segments, *, now: Segments | None = None
) -> tuple[dict[str, Any], S]:
    """(relabelled dict, spec with ``segments``) of a flat dict whose keys are, or end in, parameter paths.

    Values may be arrays (a stacked one has the repeats in front) or whole pytrees of such. Keys without a
    layer stay as they are. ``now``: the segments the dict has, where they are not ``spec.segments``. Raises
    RequestError where a stack would hold layers of which some have the key and others not (a stack is trained
    or frozen as a whole), on a layer the spec does not have, and on segments with other kinds of layers.
    """
    source = spec.with_segments(spec.segments if now is None else now)
    target = spec.with_segments(segments)
    if target.kinds != source.kinds:  # relabelled so, local layers would see everything, or the reverse
        raise RequestError(f"restack: segments {segments!r} change the kinds of layers; accepted: {source.kinds!r}")
    return _stacked(_single(tree, source), target), target


def restack_tree(tree: Any, spec: Layered, segments: Segments) -> Any:
    """`restack` on every dict of parameter paths inside any pytree: optimizer states, Fisher, anchors."""

    def is_table(node: Any) -> bool:
        return isinstance(node, dict) and any(isinstance(k, str) and LAYER.match(k) for k in node)

    return jax.tree.map(lambda n: restack(n, spec, segments)[0] if is_table(n) else n, tree, is_leaf=is_table)


def _single(tree: Mapping[str, Any], spec: Layered) -> dict[str, Any]:
    """Every layer under its own number."""
    layers = {p.removeprefix("layers/"): r for run in spec.runs for p, r in zip(run.prefixes, run.layers)}
    out: dict[str, Any] = {}
    for path, value in tree.items():
        match = LAYER.match(path)
        if match is None:
            out[path] = value
            continue
        if match["at"] not in layers:
            raise unknown("layer", match["at"], layers, where=f"key {path!r}")
        for row, layer in enumerate(layers[match["at"]]):
            one = value if ":" not in match["at"] else jax.tree.map(lambda x, row=row: x[row], value)
            out[f"{match['head']}/{layer}/{match['rest']}"] = one
    return out


def _stacked(tree: Mapping[str, Any], spec: Layered) -> dict[str, Any]:
    """From single layers to the keys of ``spec.segments``."""
    stacks = [pair for run in spec.runs if run.repeats > 1 for pair in zip(run.prefixes, run.layers)]
    place = {i: (prefix, layers) for prefix, layers in stacks for i in layers}
    out: dict[str, Any] = {}
    for path, value in tree.items():
        match = LAYER.match(path)
        if match is None or int(match["at"]) not in place:
            out[path] = value
            continue
        prefix, layers = place[int(match["at"])]
        key = f"{match['head']}/{prefix.removeprefix('layers/')}/{match['rest']}"
        if key not in out:
            parts = [f"{match['head']}/{i}/{match['rest']}" for i in layers]
            for part in parts:
                if part not in tree:
                    raise RequestError(f"cannot stack {key!r}: no {part!r}; accepted: all of its layers or none")
            out[key] = jax.tree.map(_stack, *(tree[part] for part in parts))
    return out


def _stack(*leaves: Any) -> Any:
    """Leaves on a new leading axis: numpy stays numpy."""
    return np.stack(leaves) if all(isinstance(x, np.ndarray) for x in leaves) else jnp.stack(leaves)
