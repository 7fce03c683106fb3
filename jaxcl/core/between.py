"""Between phases: the world, every method's memory, and the host slots `begin`, `mask`, `init`, `plan`, `end`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl.core import compose, journal
from jaxcl.core.experiment import Experiment
from jaxcl.core.paths import merge
from jaxcl.core.sharding import Placement, make_mesh, placed
from jaxcl.core.step import step_key
from jaxcl.core.tools import Toolbox
from jaxcl.core.types import Batch, Fixed, Method, Own, Params, Phase, State, Stream, World
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.surgery.edit import carry, complete


class Between:
    """What a stage hands to the next. ``owns``: {method: memory}, ``owner``: {path: method that made it}."""

    def __init__(self, exp: Experiment, check: Callable[[], None], mesh: Mesh | None = None):
        self.exp, self.check = exp, check
        self.methods: tuple[Method, ...] = tuple(exp.methods)
        self.mesh = make_mesh(exp.mesh) if mesh is None else mesh
        self.placement = self._placement(exp.model.spec, exp.params)
        self.sources = [s.train for s in exp.stages]
        self.toolbox = Toolbox(exp.model, self.methods, self.sources, exp.batch_size, self.batch, self.spread)
        self.owns: dict[str, Own] = {}
        self.owner: compose.Owner = {}
        params = self.placement.put(dict(sorted(exp.params.items())))
        bare = self.toolbox.tools(None, {})
        self.world = World(exp.model.spec, params, frozenset(), 0, 0, jax.random.key(exp.seed), bare, {}, ())

    def _placement(self, spec: Any, params: Any) -> Placement:
        return Placement(self.mesh, self.exp.model.axes(spec, params), self.exp.rules)

    def batch(self, batch: Any) -> Any:
        """A host batch as global arrays under today's placement."""
        return self.placement.batch(batch)

    def spread(self, tree: Any) -> Any:
        """Shardings of a pytree of arrays under today's placement."""
        return self.placement.tree(tree)

    def given(self, n: int, slot: int) -> World:
        """The world with the tools and the random key of one method's slot; a repeat gets the same key."""
        key = jax.random.key(self.exp.seed)
        for part in (self.world.stage, 1_000_003 + slot, n):
            key = jax.random.fold_in(key, part)
        world = self.world._replace(key=key, owner=dict(self.owner))
        m = self.methods[n] if n < len(self.methods) else None
        return world._replace(tools=self.toolbox.tools(world, self.owns, self.check, m))

    def begin(self, stage: int) -> None:
        """`begin` of all in list order, the votes, `init` of those without memory.

        Raises RequestError when nothing is left to train or a memory holds an array of size zero.
        """
        self.world = self.world._replace(stage=stage, phase=0, trained=frozenset(), edits=())
        for n, m in enumerate(self.methods):
            own = self.owns.get(m.name)
            own = None if own is None else carry(own, m.kinds, self.world.edits)
            if m.begin is not None:
                before, seen = set(self.world.params), len(self.world.edits)
                try:
                    self.world, own = m.begin(self.given(n, 0), own)
                except KeyTaken as e:
                    maker = self.owner.get(e.key, "the given weights")
                    raise RequestError(f"methods {maker!r} and {m.name!r} do not go together: {e}") from e
                self.world = self.world._replace(params=dict(sorted(self.world.params.items())))
                edits = tuple(dataclasses.replace(e, by=m.name) for e in self.world.edits[seen:])
                self.world = self.world._replace(edits=(*self.world.edits[:seen], *edits))
                self._own(m, before, edits)
                for other in self.methods[:n]:  # those behind see these edits before their own begin
                    self.owns[other.name] = carry(self.owns[other.name], other.kinds, self.world.edits[seen:])
            self.owns[m.name] = whole(own)
        self.owner = {k: v for k, v in self.owner.items() if k in self.world.params}
        self.world = self.world._replace(trained=compose.vote(self.methods, self.world, self.owns, self.owner))
        for n, m in enumerate(self.methods):
            if m.init is None:
                continue
            if not any(self.owns[m.name].values()):
                self.owns[m.name] = whole(m.init(self.given(n, 1)))
            elif m.kinds and any(e.born or e.moved for e in self.world.edits):
                self.owns[m.name] = complete(self.owns[m.name], whole(m.init(self.given(n, 1))), m.kinds)
        self._settle()

    def _own(self, m: Method, before: set[str], edits: tuple[Any, ...]) -> None:
        """Keys that appeared in a method's `begin` are its own; what a surgery only moved keeps its owner."""
        for edit in edits:
            self.owner = edit.owners(self.owner, m.name)
        moved = {path for edit in edits for path in edit.moved}
        self.owner |= {k: m.name for k in self.world.params if k not in before and k not in moved}

    def plan(self, phase: int) -> list[Phase]:
        """The stage's phases as all methods want them, as of now. Raises RequestError, see `compose.fold_plans`."""
        exp, i = self.exp, self.world.stage
        self.world = self.world._replace(phase=phase)
        rows = np.arange(len(self.sources[i]), dtype=np.int64)
        one = Phase("train", exp.steps, (Stream(i, rows),), epochs=exp.epochs, reset_opt=exp.reset_opt)
        return compose.fold_plans(self.methods, self.given(0, 2), self.owns, list(exp.phases) or [one])

    def collect(self, phase: Phase, frozen: Params, state: State, batch: Any) -> tuple[State, Any]:
        """A batch made into a rollout by the method that does so, and the state with what it learnt by it."""
        m = next(m for m in compose.active(self.methods, phase) if m.collect is not None)
        assert m.collect is not None
        owns = {k: {**own, "live": state.live.get(k, {})} for k, own in self.owns.items()}
        key = jax.random.fold_in(step_key(self.exp.seed, state.clock), 2)
        world = self.world._replace(params=merge(frozen, state.train), key=key)
        world = world._replace(tools=self.toolbox.tools(world, owns, self.check, m))
        rollout, own = m.collect(world, owns[m.name], batch, key)
        live = self.placement.put(own["live"], copy=True)
        rollout = jax.tree.map(lambda x: placed(x, self.placement.batch_of(np.shape(x))), rollout)
        return dataclasses.replace(state, live={**state.live, **({m.name: live} if live else {})}), rollout

    def after(self, phase: Phase) -> None:
        """Host code behind a phase's last step, with the memory of the method that planned it."""
        if phase.after is None:
            return
        n = next((n for n, m in enumerate(self.methods) if m.name == phase.by), len(self.methods))
        self.world, own = phase.after(self.given(n, 4), self.owns.get(phase.by, whole(None)))
        if phase.by:
            self.owns[phase.by] = whole(own)
        self._settle()

    def end(self) -> None:
        """`end` of all in reverse list order."""
        for n, m in reversed(list(enumerate(self.methods))):
            if m.end is not None:
                self.check()
                seen = len(self.world.edits)
                self.world, own = m.end(self.given(n, 3), self.owns[m.name])
                self.world = self.world._replace(params=dict(sorted(self.world.params.items())))
                self.owns[m.name] = whole(own)
                for other in (o for o in self.methods if o is not m):
                    self.owns[other.name] = carry(self.owns[other.name], other.kinds, self.world.edits[seen:])
        self._settle()

    def _settle(self) -> None:
        """Puts what host code made where it belongs."""
        self.placement = self._placement(self.world.spec, self.world.params)
        self.world = self.world._replace(params=self.placement.put(self.world.params))
        for name, own in self.owns.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path((own["fixed"], own["live"])):
                if not np.size(leaf):
                    where = jax.tree_util.keystr(path)
                    raise RequestError(f"method {name!r} holds an array of size 0 at {where}; leave it out instead")
            own["fixed"], own["live"] = self.placement.put(own["fixed"]), self.placement.put(own["live"])

    def device(self, part: str) -> dict[str, Any]:
        """{method: the ``fixed`` or ``live`` part of its memory}, of those that have one."""
        return {m.name: self.owns[m.name][part] for m in self.methods if self.owns[m.name][part]}

    def fixed(self, frozen: Params, batch: Batch) -> Fixed:
        """What is constant in a phase, as its step gets it: every `fold` in list order. ``frozen`` itself stays."""
        folded = frozen
        for m in self.methods:
            if m.fold is not None:
                folded = m.fold(folded, self.owns[m.name], batch)
        return Fixed(folded if folded is frozen else self.placement.put(folded), self.device("fixed"))

    # to and from the journal

    def pack(self, opt: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays, JSON) of all this; ``opt``: the optimizer's flat state where it is carried on, else empty."""
        arrays, meta = journal.pack_world(self.world, self.owns)
        return {**arrays, **opt}, {**meta, "owner": self.owner}

    def unpack(self, load: Callable[..., dict[str, Any]], meta: dict[str, Any], stage: int) -> Params:
        """Takes everything from the journal, ``load(place) -> arrays``; returns the optimizer's flat state."""
        spec = journal.packed_spec(self.world.spec, meta)
        self.placement = self._placement(spec, journal.packed_shapes(meta))
        arrays = load(self.place)
        self.world, self.owns = journal.unpack_world(self.world._replace(stage=stage), arrays, meta)
        self.owner = dict(meta["owner"])
        return {k: v for k, v in arrays.items() if k.startswith("opt/")}

    def place(self, key: str, shape: tuple[int, ...]) -> Any:
        """Sharding of a journal's array: by the last part of its key that is a parameter path."""
        if key.startswith("rollout/"):
            return self.placement.batch_of(shape)
        path = next((n for n in reversed(journal.parts(key)) if n in self.placement.axes), None)
        return self.placement.param(path, shape) if path else self.placement.replicated


def whole(own: Own | None) -> Own:
    """A memory with all its parts, empty where the method has none."""
    own = own or {}
    return {"fixed": own.get("fixed") or {}, "live": own.get("live") or {}, "host": own.get("host") or {}}


def row_ids(batch: Any, phase: Phase, sources: Sequence[Any], most: int = 8) -> list[str]:
    """Names of the rows of a host batch, for errors; of a rollout that was restored they are not known."""
    if not batch:
        return ["rows of a rollout"]
    ids = []
    for s, r in zip(np.ravel(batch["source"]), np.ravel(batch["row"]), strict=True):
        if s >= 0 and r >= 0:
            ids.append(str(sources[phase.streams[int(s)].stage].id(int(r))))
    return [*ids[:most], *(["..."] if len(ids) > most else [])]
