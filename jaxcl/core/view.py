"""The model as evaluation sees it: the weights of one moment, wrapped by the methods, every shape compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcl.core import compose
from jaxcl.core.types import Clock, Method, Model, Params


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
        self._jitted: dict[Any, Callable] = {}

    def at(self, spec: Any, params: Params, fixed: dict, live: dict, clock: Clock) -> View:
        """This view on other weights: ``fixed`` and ``live`` are {method: memory}."""
        names = {m.name for m in self.methods}
        self.spec, self.params, self.clock = spec, params, clock
        self.fixed = {k: v for k, v in fixed.items() if k in names}
        self.live = {k: v for k, v in live.items() if k in names}
        return self

    def call(self, fn: Callable, *args: Any) -> Any:
        """``fn(apply, head, spec, params, *args)``, jitted; compiled once per (fn, spec, shapes of args).

        ``fn`` is a cache key, so pass one stable object. Arrays in ``args`` that live on the host have their
        leading axis sharded as a batch's rows are.
        """
        spec, bare = self.spec, not self.fixed and not self.live
        key = (fn, spec, bare)
        if key not in self._jitted:
            model, methods = self.model, () if bare else self.methods

            def run(params: Params, fixed: dict, live: dict, clock: Clock, args: tuple) -> Any:
                apply = compose.wrapped(model.apply, methods, fixed, live, clock)
                return fn(apply, model.head, spec, params, *args)

            self._jitted[key] = jax.jit(run)
        return self._jitted[key](self.params, self.fixed, self.live, self.clock, self.place(args))
