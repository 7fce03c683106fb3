"""Parameter paths: patterns over the flat dict, splitting and merging it, and what a stack of layers is.

A scanned run of layers has one key whose layer number is a slice, ``layers/0:30:1/attn/q/kernel``; its leading
axis counts layers and is not part of the tensor. Patterns speak of single layers, however they are stored.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxcl.core.types import Params
from jaxcl.errors import RequestError, nearest

_SLICE = re.compile(r"(?<![^/])(\d+):(\d+):(\d+)(?![^/])")


def is_stacked(path: str) -> bool:
    """Whether the leading axis of this key counts layers."""
    return _SLICE.search(path) is not None


def concrete(path: str) -> list[str]:
    """The single-layer paths behind a key: itself, or one per layer of a stack."""
    found = _SLICE.search(path)
    if not found:
        return [path]
    start, stop, step = map(int, found.groups())
    return [path[: found.start()] + str(i) + path[found.end() :] for i in range(start, stop, step)]


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether shell-style patterns (``layers/*/attn/[qv]/kernel``) name this key.

    A pattern without a leading path also matches at any depth (``attn/q/kernel``). Raises RequestError when a
    pattern names some but not all layers of a stack: a stack is trained or frozen as a whole.
    """
    patterns = tuple(patterns)
    names = concrete(path)
    hits = [any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, "*/" + p) for p in patterns) for n in names]
    if any(hits) and not all(hits):
        raise RequestError(
            f"the pattern {patterns[0]!r} names {sum(hits)} of the {len(hits)} layers stacked in {path!r}; "
            "a stack is trained or frozen as a whole: restack the model so that these layers stand alone"
        )
    return all(hits)


def sites(params: Mapping[str, Any], targets: Iterable[str]) -> list[str]:
    """Dense sites named by ``targets`` (``attn/q``, ``layers/3/mlp/*``): prefixes that have a ``/kernel``.

    Raises RequestError with the nearest sites when a target names none.
    """
    known = sorted(k.removesuffix("/kernel") for k in params if k.endswith("/kernel") and k.count("/") > 1)
    found: set[str] = set()
    for target in targets:
        hit = [s for s in known if matches(s, (target,))]
        if not hit:
            short = {s.partition("layers/")[2].partition("/")[2] for s in known}
            raise RequestError(f"target {target!r} names no dense site of the model; {nearest(target, short)}")
        found.update(hit)
    return sorted(found)


def split(params: Params, keys: Iterable[str]) -> tuple[Params, Params]:
    """(the entries named by ``keys``, all others): how a mask is applied."""
    chosen = frozenset(keys)
    return {k: v for k, v in params.items() if k in chosen}, {k: v for k, v in params.items() if k not in chosen}


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One flat dict of all parts, keys sorted so that the order never depends on history."""
    whole: dict[str, Any] = {}
    for part in parts:
        whole.update(part)
    return dict(sorted(whole.items()))


def per_tensor(fn: Callable[..., Any], path: str, *arrays: Any) -> Any:
    """``fn(*arrays)`` on one tensor; mapped over the leading axis where ``path`` is a stack."""
    return jax.vmap(fn)(*arrays) if is_stacked(path) else fn(*arrays)


def layer_shape(path: str, array: Any) -> tuple[int, ...]:
    """Shape of one layer's tensor: without the stack axis."""
    return tuple(array.shape[1:] if is_stacked(path) else array.shape)
