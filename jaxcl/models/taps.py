"""Names of activations a caller may ask for, and the way from a stacked layer's values to one layer's."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import jax

from ..core.types import Inject
from ..errors import RequestError, unknown
from .layout import layout
from .segments import Layered, Run
from .spec import DecoderSpec


def tap_names(spec: DecoderSpec) -> tuple[str, ...]:
    """All taps: ``layers/{i}/{site}:in`` of every dense site, ``layers/{i}:out``."""
    kernels = (path for path in layout(spec) if path.startswith("layers/") and path.endswith("/kernel"))
    sites = tuple(path.removesuffix("/kernel") + ":in" for path in kernels)
    return sites + tuple(f"layers/{i}:out" for i in range(spec.layers))


def check_taps(taps: tuple[str, ...], known: Collection[str]) -> None:
    """RequestError on a name that is not among the ``known``."""
    for name in taps:
        if name not in known:
            raise unknown("tap", name, known)


def local_taps(run: Run, taps: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """{prefix: local names wanted of any layer behind it}."""
    wanted: dict[str, frozenset[str]] = {}
    for prefix, layers in zip(run.prefixes, run.layers):
        wanted[prefix] = frozenset(_local(name) for name in taps if _layer(name) in layers)
    return wanted


def local_injections(
    spec: Layered, inject: Mapping[str, Inject], taps: Collection[str]
) -> dict[str, dict[str, Inject]]:
    """{prefix: {local site: function}}; RequestError on a site without a tap, or one that stands in a stack, whose
    layers are one program and cannot be told apart."""
    known = {name.removesuffix(":in") for name in taps if name.endswith(":in")}
    single = {prefix for run in spec.runs if run.repeats == 1 for prefix in run.prefixes}
    placed: dict[str, dict[str, Inject]] = {}
    for site, function in inject.items():
        if site not in known:
            raise unknown("site", site, known, where="inject")
        prefix = "/".join(site.split("/")[:2])
        if prefix not in single:
            raise RequestError(f"inject: {site!r} is in a stack of layers; restack so that {prefix!r} stands alone")
        placed.setdefault(prefix, {})[site.removeprefix(prefix + "/")] = function
    return placed


def select(spec: Layered, seen: dict[str, jax.Array], taps: tuple[str, ...]) -> dict[str, jax.Array]:
    """{tap: its array}, cut out of a stack's [R, ...] where the layer is stacked."""
    out = {}
    for name in taps:
        for run in spec.runs:
            for prefix, layers in zip(run.prefixes, run.layers):
                if _layer(name) in layers:
                    value = seen[joined(prefix, _local(name))]
                    out[name] = value if run.repeats == 1 else value[layers.index(_layer(name))]
    return out


def joined(prefix: str, local: str) -> str:
    """``layers/7`` and ``attn/q:in`` -> ``layers/7/attn/q:in``; ``out`` -> ``layers/7:out``."""
    return f"{prefix}:out" if local == "out" else f"{prefix}/{local}"


def _layer(name: str) -> int:
    return int(name.split("/")[1].partition(":")[0])


def _local(name: str) -> str:
    parts = name.split("/", 2)
    return parts[2] if len(parts) == 3 else parts[1].partition(":")[2]
