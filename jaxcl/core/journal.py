"""What a run writes between phases, and how a later process finds its way back.

    stages/<i>/<j>-<phase>/begun     the world as the phase starts: weights, memories, who owns which key
    stages/<i>/<j>-<phase>/step-<n>  State and data iterator inside the phase
    stages/<i>/<j>-<phase>/done      the world after its last step
    stages/<i>/done                  after `end` and evaluation

Resume takes the newest entry that is intact, together with all that it refers to.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.core.checkpoint import Store
from jaxcl.core.processes import agree
from jaxcl.core.types import World

_ENTRY = re.compile(r"stages/(\d+)/(?:(\d+)-[^/]+/(begun|done|step-(\d+))|done)$")


class At(NamedTuple):
    """Position of an entry; ordered as the run goes. kind: begun, step, done or stage."""

    stage: int
    phase: int
    rank: int
    step: int
    kind: str


def position(entry: str) -> At | None:
    """Where an entry stands, None for names that are none of ours."""
    found = _ENTRY.match(entry)
    if not found:
        return None
    stage, phase, word, step = found.groups()
    if phase is None:
        return At(int(stage), 10**6, 0, 0, "stage")
    if step is not None:
        return At(int(stage), int(phase), 1, int(step), "step")
    return At(int(stage), int(phase), 0 if word == "begun" else 2, 0, word)


def entry_name(stage: int, phase: int | None = None, name: str = "", kind: str = "", step: int = 0) -> str:
    """The entry's folder, relative to the checkpoints'."""
    if phase is None:
        return f"stages/{stage:03d}/done"
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return f"stages/{stage:03d}/{phase:02d}-{safe}/" + (f"step-{step:08d}" if kind == "step" else kind)


def newest(store: Store, say: Callable[[str], None]) -> str | None:
    """The newest intact entry. Damaged ones are named through ``say``; all that come after it are removed."""
    store.sweep()
    ordered = sorted((p, e) for e in store.entries() if (p := position(e)) is not None)
    found, dropped = None, []
    for _, entry in reversed(ordered):
        why = damage(store, entry)
        if not why:
            found = entry
            break
        dropped.append((entry, why))
    for entry, why in dropped:
        say(f"checkpoint {entry} is damaged ({why}); going back to {found or 'the start'}")
        store.delete(entry)
    return found


def damage(store: Store, entry: str) -> str:
    """'' or what is wrong with an entry, or with the start of its phase, which a step cannot do without."""
    why = store.damage(entry)
    begun = "" if why else store.read(entry)["meta"].get("begun", "")
    if begun and (lost := store.damage(begun)):
        return f"it builds on {begun}: {lost}"
    return why


def prune(store: Store, stage: int, keep: int, steps: int = 2) -> None:
    """Removes step entries but the last two, and stages before the last ``keep``, unless something refers to them.

    Collective: process 0 decides."""
    for entry in agree(_outdated(store, stage, keep, steps) if store.process == 0 else []):
        store.delete(entry)


def _outdated(store: Store, stage: int, keep: int, steps: int) -> list[str]:
    entries = {e: p for e in store.entries() if (p := position(e)) is not None}
    step_entries = sorted((p, e) for e, p in entries.items() if p.kind == "step")
    old_steps = {e for _, e in step_entries[:-steps]}
    retained = {e for e, p in entries.items() if p.stage >= stage - keep and e not in old_steps}
    return sorted(set(entries) - store.closure(retained))


# a world as a flat dict of arrays and a JSON, and back


def flatten(tree: Any, prefix: str) -> dict[str, Any]:
    """{prefix/path: leaf} for any pytree of dicts, tuples and records."""
    return {prefix + _text(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _text(path: tuple) -> str:
    names = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path]
    return "".join("/" + n.replace("%", "%25").replace("/", "%2F") for n in names)


def parts(key: str) -> list[str]:
    """The names along a flat key, as they were before `flatten`."""
    return [p.replace("%2F", "/").replace("%25", "%") for p in key.split("/")]


def unflatten_like(like: Any, arrays: Mapping[str, Any], prefix: str) -> Any:
    """The pytree of ``like``'s structure with the leaves found in ``arrays``."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [arrays[prefix + _text(p)] for p, _ in paths])


def nest(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The nested dict behind the keys ``prefix/a/b``; memories are nested dicts, so nothing else is needed."""
    out: dict[str, Any] = {}
    for key, value in arrays.items():
        if not key.startswith(prefix + "/"):
            continue
        *above, last = parts(key[len(prefix) + 1 :])
        node = out
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return out


def split_host(tree: Any) -> tuple[Any, Any]:
    """(the numpy arrays, the JSON) of a host memory: nested dicts whose leaves are either."""
    if isinstance(tree, Mapping):
        pairs = {k: split_host(v) for k, v in tree.items()}
        arrays = {k: a for k, (a, _) in pairs.items() if not (isinstance(a, dict) and not a) and a is not None}
        return arrays, {k: j for k, (_, j) in pairs.items() if j is not None}
    return (tree, None) if isinstance(tree, np.ndarray) else (None, tree)


def join_host(arrays: Any, plain: Any) -> Any:
    """The inverse of `split_host`."""
    if not isinstance(plain, Mapping):
        return arrays if plain is None else plain
    keys = [*plain, *(k for k in (arrays or {}) if k not in plain)]
    return {k: join_host((arrays or {}).get(k), plain.get(k)) for k in keys}


def pack_world(world: World, owns: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, JSON) of a world: parameters and memories."""
    arrays = flatten(dict(world.params), "params")
    host = {}
    for name, own in owns.items():
        for part in ("fixed", "live"):
            arrays |= flatten(own.get(part) or {}, f"own/{name}/{part}")
        numpy_part, host[name] = split_host(own.get("host") or {})
        arrays |= flatten(numpy_part, f"own/{name}/host")
    meta = {
        "spec": dataclasses.asdict(world.spec) if dataclasses.is_dataclass(world.spec) else None,  # type: ignore[arg-type]
        "shapes": {k: [list(v.shape), str(v.dtype)] for k, v in world.params.items()},
        "trained": sorted(world.trained),
        "notes": dict(world.notes),
        "host": host,
    }
    return arrays, meta


def packed_spec(spec: Any, meta: Mapping[str, Any]) -> Any:
    """The spec as it was packed, of the type of ``spec``."""
    if meta["spec"] is None:
        return spec
    return dataclasses.replace(spec, **{k: _tuples(v) for k, v in meta["spec"].items()})


def packed_shapes(meta: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{parameter path: shape and dtype} as packed."""
    return {k: jax.ShapeDtypeStruct(tuple(shape), dtype) for k, (shape, dtype) in meta["shapes"].items()}


def unpack_world(world: World, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[World, dict[str, Any]]:
    """The world and all memories as they were packed; ``world`` gives the type of the spec."""
    spec = packed_spec(world.spec, meta)
    owns = {}
    for name, plain in meta["host"].items():
        memory = nest(arrays, f"own/{name}")
        own = {part: memory.get(part, {}) for part in ("fixed", "live")}
        owns[name] = own | {"host": join_host(memory.get("host"), plain)}
    params = dict(sorted(nest(arrays, "params").items()))
    world = world._replace(spec=spec, params=params, trained=frozenset(meta["trained"]), notes=meta["notes"])
    return world, owns


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
