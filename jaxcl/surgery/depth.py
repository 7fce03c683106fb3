"""More layers: copies put between the layers of a decoder, and taken out again. Sources: LLaMA Pro (Wu et al. 2024),
ELLE (Qin et al. 2022)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcl.core.paths import is_stacked
from jaxcl.core.types import Params, World
from jaxcl.errors import RequestError
from jaxcl.models.spec import DecoderSpec, Segments
from jaxcl.models.stacking import LAYER, restack
from jaxcl.surgery.edit import Edit, Origin, operated

OUTPUTS = ("attn/o/kernel", "attn/o/bias", "mlp/down/kernel", "mlp/down/bias")
"""What a layer adds to the residual stream goes through these."""
ADAPTERS = ("lora_", "bank_", "in_scale", "out_scale", "in_delta", "out_delta", "prefix_", "adapter_",
            "parallel_", "scale_delta", "expert_")  # fmt: skip


class Layer(NamedTuple):
    """A layer of the deeper model: the number of the layer it was, and whether it is a new copy of that one."""

    source: int
    copy: bool = False


def grouped(layers: int, groups: int, per_group: int) -> list[Layer]:
    """LLaMA Pro's order: the layers in ``groups`` equal groups, the top ``per_group`` of each copied on top of it.

    Raises RequestError where the layers cannot be divided, or a group has fewer layers than are copied.
    """
    if groups < 1 or layers % groups:
        divisors = [n for n in range(1, layers + 1) if layers % n == 0]
        raise RequestError(f"{layers} layers in {groups} groups: accepted: a number of groups out of {divisors}")
    size = layers // groups
    if not 1 <= per_group <= size:
        raise RequestError(f"{per_group} copies per group of {size} layers: accepted: 1 to {size}")
    order: list[Layer] = []
    for top in range(size, layers + 1, size):
        order += [Layer(i) for i in range(top - size, top)]
        order += [Layer(i, copy=True) for i in range(top - per_group, top)]
    return order


def deepen(world: World, order: Sequence[Layer], *, silent: bool) -> World:
    """The world with the layers of ``order``.

    silent: copies add nothing yet (the kernels and biases of `OUTPUTS` are zero), so the function is the same bit for
    bit; they are new tensors, without adapters, and belong to the method that calls this. Else they are plain copies
    (ELLE's depth growth), which changes the function, with their adapters, and belong to whom their layer does.
    Raises RequestError for a model that is not a decoder of this library.
    """
    spec = world.spec
    if not isinstance(spec, DecoderSpec):
        raise RequestError(f"the layers of a {type(spec).__name__} cannot be copied; accepted: a DecoderSpec")
    deeper = dataclasses.replace(spec, layers=len(order), segments=segments_of(spec, order))
    moved, fills = {}, {}
    for path, (rest, layers) in _keys(world.params, deeper, spec, order).items():
        new = order[layers[0]].copy
        if new and silent and rest.rpartition("/")[2].startswith(ADAPTERS):
            continue
        parts = tuple(_place(spec, world.params, order[i].source, rest) for i in layers)
        old = world.params[parts[0][0]]
        rank = old.ndim - is_stacked(parts[0][0])
        origin = Origin(parts, rank, stacked=is_stacked(path), fresh=new)
        if new and silent:
            value = origin.build(world.params, "value")
            fills[path] = jnp.zeros_like(value) if rest in OUTPUTS else value + 0
        else:
            moved[path] = origin
    edit = Edit(fills, moved=moved, born=frozenset(fills), exact=silent or not any(layer.copy for layer in order))
    return operated(world, deeper, edit)


def without(params: Params, spec: DecoderSpec, drop: Sequence[int]) -> tuple[Params, DecoderSpec]:
    """(weights, spec) of the model without some layers, every layer under its own key. Shapes as they are."""
    single, flat = restack(params, spec, spec.unstacked)
    keep = [i for i in range(spec.layers) if i not in set(drop)]
    out: Params = {}
    for path, value in single.items():
        match = LAYER.match(path)
        if match is None:
            out[path] = value
        elif int(match["at"]) in keep:
            out[f"{match['head']}/{keep.index(int(match['at']))}/{match['rest']}"] = value
    kinds = tuple(spec.kinds[i] for i in keep)
    return out, dataclasses.replace(flat, layers=len(keep), segments=((kinds, 1),))


def segments_of(spec: DecoderSpec, order: Sequence[Layer]) -> Segments:
    """Layers with keys of their own stay so. Of stacked ones, copies never share a stack with old layers: the shortest
    pattern that repeats, else runs of equal layers."""
    kinds = [spec.kinds[layer.source] for layer in order]
    if all(repeats == 1 for _, repeats in spec.segments):
        return ((tuple(kinds), 1),)
    marks = [(kind, layer.copy) for kind, layer in zip(kinds, order, strict=True)]
    for period in range(1, len(marks) // 2 + 1):
        if len(marks) % period == 0 and marks == marks[:period] * (len(marks) // period):
            return ((tuple(kinds[:period]), len(marks) // period),)
    return tuple(((kind,), len(list(run))) for (kind, _), run in itertools.groupby(marks))


def _keys(params: Params, deeper: DecoderSpec, spec: DecoderSpec, order: Sequence[Layer]) -> dict[str, Any]:
    """{new path: (rest of the path, numbers of its layers in the deeper model)} of all layers' tensors."""
    rests: dict[int, list[str]] = {i: [] for i in range(spec.layers)}
    numbers = {prefix: layers for run in spec.runs for prefix, layers in zip(run.prefixes, run.layers, strict=True)}
    for path in params:
        if (match := LAYER.match(path)) is not None:
            for i in numbers["layers/" + match["at"]]:
                rests[i].append(match["rest"])
    return {
        f"{prefix}/{rest}": (rest, layers)
        for run in deeper.runs
        for prefix, layers in zip(run.prefixes, run.layers, strict=True)
        for rest in rests[order[layers[0]].source]
    }


def _place(spec: DecoderSpec, params: Params, layer: int, rest: str) -> tuple[str, int | None]:
    """(path, row of the stack or None) where a layer's tensor is now."""
    for run in spec.runs:
        for prefix, layers in zip(run.prefixes, run.layers, strict=True):
            if layer in layers:
                return f"{prefix}/{rest}", None if run.repeats == 1 else layers.index(layer)
    raise AssertionError(f"no layer {layer} in {spec.layers}")
