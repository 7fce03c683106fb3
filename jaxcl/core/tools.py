"""What methods may use between phases: batches and means over training rows, through the wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core import compose
from jaxcl.core.host_rng import host_rng
from jaxcl.core.paths import merge, split
from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Clock, Method, Model, Outputs, Params, Stream, Tools, World
from jaxcl.data.pipeline import batches as rows_once
from jaxcl.errors import RequestError
from jaxcl.models.generate import generate


class Forward:
    """``forward(train, batch) -> Outputs`` without dropout, differentiable in ``train``; taps by keyword."""

    def __init__(self, model: Model, apply: Any, spec: Any, frozen: Params):
        self.model, self.apply, self.spec, self.frozen = model, apply, spec, frozen

    def __call__(self, train: Params, batch: Batch, *, taps: tuple[str, ...] = ()) -> Outputs:
        return self.apply(self.spec, merge(self.frozen, train), batch, taps=taps)

    def generate(self, train: Params, prompts: jax.Array, lengths: jax.Array, **how: Any) -> tuple:
        """(tokens, lengths) continuing the prompts, through all methods' wraps; see `jaxcl.models.generate`."""
        params = merge(self.frozen, train)
        return generate(self.apply, self.model.head, self.spec, params, prompts, lengths, **how)

    def logits(self, train: Params, out: Outputs, at: jax.Array) -> jax.Array:
        """f32[B,N,V]: logits of the token after each position ``at`` i32[B,N]."""
        return self.model.head(self.spec, merge(self.frozen, train), out.hidden, at)


class Toolbox:
    """Makes `Tools` for a World; keeps what is compiled over all stages of a run."""

    def __init__(
        self, model: Model, methods: Sequence[Method], sources: Sequence[Any], batch_size: int,
        place: Callable[[Batch], Batch], spread: Callable[[Any], Any],
    ):  # fmt: skip
        self.model, self.methods, self.sources = model, tuple(methods), sources
        self.batch_size, self.place = batch_size, place
        self.spread = spread  # shardings of a tree of arrays by the paths in it, see `Placement.tree`
        self._asked: dict[Any, Callable] = {}

    def tools(
        self, world: World | None, owns: dict, stop: Callable[[], None] = lambda: None, method: Method | None = None
    ) -> Tools:
        """The tools as of ``world``, for one method; ``stop`` is called between batches and may raise."""

        def batches(stage: int, n: int | None = None) -> Iterator[Batch]:
            self._check(world, stage)
            seed = host_rng(world.key) if world else np.random.default_rng(0)
            size = len(self.sources[stage])
            rows = seed.permutation(size)[: size if n is None else min(n, size)]
            for batch in rows_once(self.sources[stage], np.sort(rows).tolist(), self.batch_size):
                stop()
                yield batch

        def mean(fn: Callable, n: int | None, key: jax.Array) -> Any:
            assert world is not None
            return self._mean_over(fn, world, owns, batches(world.stage, n), key)

        def each(fn: Callable, key: jax.Array, n: int | None = None) -> Any:
            assert world is not None
            return self._each_of(fn, world, owns, n, key, stop)

        def kept(stage: int, rows: Sequence[int]) -> Iterator[Batch]:
            assert world is not None and method is not None
            compose.check_keeps(method, [Stream(stage, np.asarray(rows, np.int64))], world)
            for batch in rows_once(self.sources[stage], rows, self.batch_size):
                stop()
                yield batch

        def call(fn: Callable, batch: Batch, key: jax.Array) -> Any:
            assert world is not None
            return self._ask(fn, world, owns, batch, key, how="whole")

        return Tools(
            batches=batches,
            mean=mean,
            each=each,
            kept=kept,
            call=call,
            size=lambda stage: len(self.sources[stage]),
            labels=lambda stage: self._labels(world, stage),
            row_bytes=lambda stage: sum(np.asarray(x).nbytes for x in self.sources[stage][0].values()),
        )

    def _check(self, world: World | None, stage: int) -> None:
        if world is not None and stage != world.stage:
            raise RequestError(
                f"rows of stage {stage} asked for in stage {world.stage}; "
                "past data opens only through keeps and streams"
            )

    def _labels(self, world: World | None, stage: int) -> np.ndarray:
        self._check(world, stage)
        source = self.sources[stage]
        return np.array([source.label(i) for i in range(len(source))])

    def _mean_over(self, fn: Callable, world: World, owns: dict, batches: Iterator[Batch], key: jax.Array) -> Any:
        total, count = None, 0
        for i, batch in enumerate(batches):
            values = self._ask(fn, world, owns, batch, jax.random.fold_in(key, i), how="summed")
            total = values if total is None else jax.tree.map(jnp.add, total, values)
            count += int(np.sum(batch["row"] >= 0))
        if total is None:
            raise RequestError(f"stage {world.stage} has no rows to take a mean over")
        return jax.tree.map(lambda x: x / np.float32(count), total)

    def _each_of(self, fn: Callable, world: World, owns: dict, n: int | None, key: jax.Array, stop: Callable) -> Any:
        source = self.sources[world.stage]
        n = len(source) if n is None else min(n, len(source))
        like = next(rows_once(source, [0], self.batch_size))
        shapes = jax.eval_shape(lambda b: self._ask(fn, world, owns, b, key, how="each"), like)
        largest = max(len(s) for s in self.sources)
        out = jax.tree.map(lambda s: np.zeros((largest, *s.shape[1:]), s.dtype), shapes)
        for i, batch in enumerate(rows_once(source, list(range(n)), self.batch_size)):
            stop()
            values = self._ask(fn, world, owns, batch, jax.random.fold_in(key, i), how="each")
            real = batch["row"] >= 0
            jax.tree.map(lambda o, v, b=batch, r=real: o.__setitem__(b["row"][r], host(v)[r]), out, values)
        return out

    def _ask(self, fn: Callable, world: World, owns: dict, batch: Batch, key: jax.Array, how: str) -> Any:
        """``fn`` of a batch: of its rows one by one, ``summed`` in f32 or stacked (``each``), or of the ``whole``."""
        train, frozen = split(world.params, world.trained)
        fixed = {k: v.get("fixed") for k, v in owns.items()}
        live = {k: v.get("live") for k, v in owns.items()}
        cached = (fn, world.spec, world.trained, how)
        if cached not in self._asked:
            self._asked[cached] = self._compile(fn, world.spec, how)
        return self._asked[cached](train, frozen, fixed, live, Clock.at(stage=world.stage), self.place(batch), key)

    def _compile(self, fn: Callable, spec: Any, how: str) -> Callable:
        model, methods = self.model, self.methods

        def ask(train: Params, frozen: Params, fixed: dict, live: dict, clock: Clock, batch: Batch, key: Any) -> Any:
            forward = Forward(model, compose.wrapped(model.apply, methods, fixed, live, clock), spec, frozen)

            if how == "whole":
                return fn(forward, train, batch, key)

            def one(i: jax.Array, row: Batch) -> Any:
                return fn(forward, train, jax.tree.map(lambda x: x[None], row), jax.random.fold_in(key, i))

            def add(carry: Any, item: tuple) -> tuple[Any, None]:
                real = (item[1]["row"] >= 0).astype(jnp.float32)
                return spread(jax.tree.map(lambda c, v: c + real * v.astype(jnp.float32), carry, one(*item))), None

            def spread(sums: Any) -> Any:  # a Fisher is as large as the model: no device has all of it
                return jax.lax.with_sharding_constraint(sums, self.spread(sums))

            items = (jnp.arange(jax.tree.leaves(batch)[0].shape[0]), batch)
            if how == "each":
                return jax.lax.map(lambda item: one(*item), items)
            shapes = jax.eval_shape(lambda: one(*jax.tree.map(lambda x: x[0], items)))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
            return jax.lax.scan(add, spread(zeros), items)[0]

        return jax.jit(ask)
