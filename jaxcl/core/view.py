"""The model as evaluation sees it: the weights of one moment, wrapped by the methods, every shape compiled once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core import compose
from jaxcl.core.types import Apply, Batch, Clock, Method, Model, Outputs, Params

_STAMPS = itertools.count()


class View:
    """Evaluators ask through this. Made once for a run; `at` moves it to new weights, compiled functions stay."""

    def __init__(self, model: Model, methods: Sequence[Method] = (), place: Callable[[Any], Any] = lambda x: x):
        self.model = model
        self.methods = tuple(m for m in methods if m.wrap is not None)
        self.place = place  # how a host batch gets onto the devices
        self.spec: Any = model.spec
        self.params: Params = {}
        self.fixed: dict[str, Any] = {}
        self.live: dict[str, Any] = {}
        self.clock = Clock.at()
        self.task: Any = None
        self.stamp = next(_STAMPS)  # another number for other weights: what was computed of these may be kept
        self._jitted: dict[Any, Callable] = {}

    def at(self, spec: Any, params: Params, fixed: dict, live: dict, clock: Clock) -> View:
        """This view on other weights: ``fixed`` and ``live`` are {method: memory}."""
        names = {m.name for m in self.methods}
        self.spec, self.params, self.clock = spec, params, clock
        self.stamp = next(_STAMPS)
        self.fixed = {k: v for k, v in fixed.items() if k in names}
        self.live = {k: v for k, v in live.items() if k in names}
        return self

    @property
    def wrapped(self) -> bool:
        """Whether `apply` may look at a prompt as a whole: where a method stands between the model and who asks, and
        where the model has an encoder (its spec says that it ``encodes``)."""
        return (bool(self.methods) and not self._bare) or getattr(self.spec, "encodes", False)

    @property
    def _bare(self) -> bool:
        return not self.fixed and not self.live

    def of(self, task: int) -> View:
        """This view for test rows of one task: `apply` finds ``task_id`` in every batch."""
        view = copy.copy(self)  # what is compiled is shared, and serves all tasks
        view.task = np.int32(task)
        return view

    def call(self, fn: Callable, *args: Any) -> Any:
        """``fn(apply, head, spec, params, *args)``, jitted; compiled once per (fn, spec, shapes of args).

        ``fn`` is a cache key, so pass one stable object. Arrays in ``args`` that live on the host have their
        leading axis sharded as a batch's rows are.
        """
        spec, bare = self.spec, self._bare
        key = (fn, spec, bare, self.task is None)
        if key not in self._jitted:
            model, methods = self.model, () if bare else self.methods

            def run(params: Params, fixed: dict, live: dict, clock: Clock, task: Any, args: tuple) -> Any:
                apply = compose.wrapped(model.apply, methods, fixed, live, clock)
                return fn(apply if task is None else told(apply, task), model.head, spec, params, *args)

            self._jitted[key] = jax.jit(run)
        return self._jitted[key](self.params, self.fixed, self.live, self.clock, self.task, self.place(args))


def told(apply: Apply, task: jax.Array) -> Apply:
    """``apply`` on batches whose rows are all of ``task`` i32[]."""

    def run(spec: Any, params: Params, batch: Batch, **kw: Any) -> Outputs:
        return apply(spec, params, {**batch, "task_id": jnp.broadcast_to(task, batch["tokens"].shape[:1])}, **kw)

    return run
