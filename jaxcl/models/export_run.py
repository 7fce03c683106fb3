"""The model a run directory ends with, read back from its journal. No method's code runs.

Frozen weights are references to what the run was given: those are loaded again by the name in the run's config.json,
or, where the run made its own, by building its experiment once more.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl import experiment_files
from jaxcl.core import journal
from jaxcl.core.checkpoint import Store
from jaxcl.core.config import as_json, parse
from jaxcl.core.paths import concrete
from jaxcl.core.rundir import RunDir
from jaxcl.errors import RequestError, unknown
from jaxcl.models import fetch
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.t5_spec import T5Spec
from jaxcl.registry import constructor

Arrays = dict[str, np.ndarray]


class Given(NamedTuple):
    """What a run started from; ``methods`` only where its experiment was built again."""

    spec: Any
    params: Mapping[str, Any]
    tokenizer: Any
    methods: tuple[Any, ...] | None


class Finished(NamedTuple):
    """spec and params (numpy, the run's own paths) after ``stage``; base: the weights the run was given (single
    layers or stacked as they were); source: what config.json says of those; notes: what a user should know."""

    spec: DecoderSpec | T5Spec
    params: Arrays
    base: Mapping[str, Any]
    tokenizer: Any
    source: dict[str, Any]
    notes: tuple[str, ...]


def finished(run: Path, experiment: str | None = None) -> Finished:
    """The last finished stage of a run directory. ``experiment``: its file, where it is not found by its name.

    Raises RequestError where there is no run, no finished stage, a damaged checkpoint, other weights than the run
    was given, a model that is no decoder, a method that changes the forward pass beyond its weights.
    """
    config = RunDir(run).read("config.json")
    if config is None:
        raise RequestError(f"{run} holds no run (no config.json); give the directory of a run")
    store = Store(run / "checkpoints")
    entry, note = last_stage(store, run)
    given = original(config, run, experiment)
    if not isinstance(given.spec, (DecoderSpec, T5Spec)):
        raise RequestError(f"{run} trained a {type(given.spec).__name__}; accepted: jaxcl's own decoder or T5")
    meta = store.read(entry)["meta"]
    try:
        spec = journal.packed_spec(given.spec, meta)
    except TypeError as error:
        raise RequestError(f"{run}: its decoder was made by another version of jaxcl: {error}") from None
    notes = (*note, *forward_notes(config, given))
    host = jax.sharding.SingleDeviceSharding(host_device())
    arrays = store.load(entry, lambda key, shape: host, Source(given.params, run), prefix="params/")
    params = {k: checked(k, v, meta["shapes"][k], run) for k, v in journal.nest(arrays, "params").items()}
    return Finished(spec, params, given.params, given.tokenizer, dict(config.get("source") or {}), notes)


def checked(path: str, value: Any, packed: Any, run: Path) -> np.ndarray:
    """A parameter in the type that the run had it in. RequestError where the given weights have another shape."""
    (shape, dtype), found = packed, np.asarray(value)
    if list(found.shape) != shape:
        raise RequestError(f"{run}: the weights it was given have {path!r} as {list(found.shape)}; accepted: {shape}")
    return found.astype(np.dtype(dtype), copy=False)


def last_stage(store: Store, run: Path) -> tuple[str, list[str]]:
    """(entry, notes) of the last finished stage. Changes nothing on disk, unlike a resume."""
    done = sorted((p, e) for e in store.entries() if (p := journal.position(e)) is not None and p.kind == "stage")
    if not done:
        raise RequestError(f"{run} has no finished stage yet; the command that started it continues it")
    at, entry = done[-1]
    if why := journal.damage(store, entry):
        raise RequestError(f"{run}: checkpoint {entry} is damaged ({why}); the command that started the run mends it")
    stages = (RunDir(run).read("matrix.json") or {}).get("stages", [])
    if at.stage + 1 < len(stages):
        name = stages[at.stage]["name"]
        return entry, [f"the run is not finished: this is stage {at.stage + 1} of {len(stages)}, {name!r}"]
    return entry, []


def original(config: Mapping[str, Any], run: Path, experiment: str | None) -> Given:
    """What the run was given: by the model's name, else by building the experiment of config.json again."""
    source = config.get("source") or {}
    if "model" in source and experiment is None:
        model, params, tokenizer, info = fetch.load(source["model"])
        if info["sha256"] != source.get("sha256"):
            raise RequestError(f"{source['model']} holds other weights than {run} was given; their SHA-256 differ")
        return Given(model.spec, params, tokenizer, None)
    name = experiment or str(config.get("experiment"))
    try:
        module = experiment_files.load(name)
    except RequestError as error:
        raise RequestError(f"{run} made its own weights: give --experiment FILE ({error})") from None
    cfg = rebuilt(module.Config(), config.get("config") or {}, f"{run}/config.json")
    if as_json(cfg) != config.get("config"):
        raise RequestError(f"{run}/config.json does not fit the Config of {name}; give --experiment FILE")
    exp = module.build(cfg)
    if json.loads(json.dumps(dict(exp.source))) != source:
        raise RequestError(f"{name} starts from other weights now than {run} was given")
    return Given(exp.model.spec, exp.params, exp.tokenizer, tuple(exp.methods))


def rebuilt(config: Any, plain: Mapping[str, Any], where: str) -> Any:
    """A Config with the values that config.json holds; the inverse of `jaxcl.core.config.as_json`."""
    hints, changes = typing.get_type_hints(type(config)), {}
    for name, value in plain.items():
        if name not in hints:
            raise unknown("key", name, hints, where=where)
        now = getattr(config, name)
        if dataclasses.is_dataclass(now):
            changes[name] = rebuilt(now, value, where)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            changes[name] = parse(text, hints[name], f"{where}: {name}")
    return dataclasses.replace(config, **changes)


class Source(Mapping[str, Any]):
    """The given weights under the journal's keys, stacked as the run had them."""

    def __init__(self, params: Mapping[str, Any], run: Path):
        self.params, self.run = params, run

    def __getitem__(self, key: str) -> np.ndarray:
        path = journal.parts(key)[1]
        value = weight_at(self.params, path)
        if value is None:
            raise RequestError(f"{self.run}: the weights it was given have no {path!r}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def weight_at(params: Mapping[str, Any], path: str) -> np.ndarray | None:
    """The weight at ``path``, put together where the path is a stack and the weights are single layers."""
    if path in params:
        return np.asarray(params[path])
    single = concrete(path)
    return np.stack([np.asarray(params[p]) for p in single]) if all(p in params for p in single) else None


def forward_notes(config: Mapping[str, Any], given: Given) -> list[str]:
    """Refuses methods whose `wrap` is part of the model: no weight file holds that. Notes those we cannot know."""
    notes, built = [], {m.name: m for m in given.methods or ()}
    for name, hparams in (config.get("methods") or {}).items():
        try:
            method = built[name] if name in built else constructor(name)(**hparams)
        except (RequestError, TypeError):
            notes.append(f"method {name!r} is not known here: what it may do to the forward pass is not exported")
            continue
        if method.wrap is not None:
            raise RequestError(
                f"method {name!r} changes the forward pass (its slot 'wrap'), which no weight file holds; "
                "accepted: runs of methods that change weights alone"
            )
    return notes


def host_device() -> jax.Device:
    """The CPU where there is one, else the first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
