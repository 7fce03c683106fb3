"""The words of the core: what flows through a step, what a method is, what a stage hands to the next.

Shapes are written with suffix letters: B rows, T tokens, K targets of a row, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]
"""Parameters are one flat dict, path -> array: ``'layers/7/attn/q/kernel'``."""

Batch = dict[str, Any]
"""Fields: tokens, segments (0 = padding), positions i32[B,T]; targets_at i32[B,K] (static K) or absent;
weight f32[B,K] or [B,T]; source i32[B] (which stream); stage i32[B] (whose row it is; -1: padding); row i32[B] (index
into the stage; -1: a row that was written, or padding); task_id i32[B], only where a run is task-incremental
(`jaxcl.core.til`); further streams nested, e.g. ``batch['ref']``; log {name: f32[B]}, what a `collect` wants in the
log, as means. One structure and shape per phase."""

Own = dict[str, Any]
"""A method's memory: ``{'fixed': device, constant in a phase; 'live': device, donated; 'host': numpy and
JSON}``. Every part is optional, a nested dict with string keys, and holds no array of size zero."""


class Clock(NamedTuple):
    """Where a run stands; traced int32 scalars inside the step."""

    step: Any
    stage: Any
    phase: Any
    phase_step: Any
    phase_len: Any

    @classmethod
    def at(cls, step: int = 0, stage: int = 0, phase: int = 0, phase_step: int = 0, phase_len: int = 1) -> Clock:
        return cls(*(np.int32(v) for v in (step, stage, phase, phase_step, phase_len)))


class Outputs(NamedTuple):
    """What a model returns; arrays only.

    nll: f32[B,K] (or [B,T] without ``targets_at``), nll of predicting token ``targets_at[b,k]`` from the
    tokens before it, in nats. hidden: [B,T,D] after the last norm. taps: {name: array}. aux: {name: array}.
    cache: the key-value cache after this call, or None.
    """

    nll: Any = None
    hidden: Any = None
    taps: Mapping[str, Any] = {}
    aux: Mapping[str, Any] = {}
    cache: Any = None


Inject = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(input [B,T,in], output [B,T,out]) of a dense site -> (what to use as its output, notes)."""


class Apply(Protocol):
    """A model's forward pass, pure: the same arguments give the same outputs. inject: {dense site: function that
    replaces its output}; its notes come back as ``Outputs.aux[site]``, so that a router's decision can go into
    the cache. start: (layer, x [B,T,D]) begins at a layer with the residual stream x that the ones below it gave:
    what is tried again and again above them need not be computed from the tokens on."""

    def __call__(
        self,
        spec: Any,
        params: Params,
        batch: Batch,
        *,
        cache: Any = None,
        taps: tuple[str, ...] = (),
        train: bool = False,
        key: jax.Array | None = None,
        inject: Mapping[str, Inject] | None = None,
        start: tuple[int, jax.Array] | None = None,
    ) -> Outputs: ...


class Model(NamedTuple):
    """An architecture: a static spec and four free functions over the flat dict.

    spec: a frozen (hashable) dataclass; ``encodes`` is True on one whose model reads a prompt as a whole.
    init(spec, key) -> Params. apply: see `Apply`.
    head(spec, params, hidden[B,T,D], at i32[B,N]) -> logits f32[B,N,V] of the token *after* position at.
    axes(spec, params) -> {path: tuple of logical axis names or None, one per dimension}, also for the
    adapter keys that methods added to ``params``.
    """

    spec: Any
    init: Callable[[Any, jax.Array], Params]
    apply: Apply
    head: Callable[[Any, Params, jax.Array, jax.Array], jax.Array]
    axes: Callable[[Any, Params], dict[str, tuple[str | None, ...]]]


class Ctx(NamedTuple):
    """What `weigh`, `loss`, `observe` and an objective see of one (micro-)batch."""

    params: Params
    own: Any  # this method's {'fixed': ..., 'live': ...}
    batch: Batch
    weight: jax.Array  # product of all `weigh`, shaped like out.nll
    out: Outputs
    clock: Clock
    key: jax.Array
    model: Callable[..., Outputs]  # the wrapped apply, (spec, params, batch, ...) -> Outputs
    spec: Any = None
    head: Callable[..., jax.Array] | None = None  # (spec, params, hidden, at) -> logits, see Model
    out_key: jax.Array | None = None  # what `out` was drawn with: a forward pass with train=True and it has its dropout


class Budget(NamedTuple):
    """What of past stages a method may hold. ``examples``: rows in total; ``bytes``; ``inputs``: without
    targets; ``all``: everything. `NOTHING` forbids it."""

    examples: int | None = None
    bytes: int | None = None
    inputs: bool = False
    all: bool = False

    def within(self, limit: Budget) -> bool:
        """Whether whoever holds at most this holds no more than ``limit`` allows."""
        if limit.all or self.all:
            return limit.all
        held = [(self.examples, limit.examples), (self.bytes, limit.bytes)]
        small = all(mine is None or (most is not None and mine <= most) for mine, most in held)
        return small and (self == NOTHING or self.inputs or not limit.inputs)

    def __str__(self) -> str:
        if self.all:
            return "all"
        parts = [f"{v} {k}" for k, v in (("examples", self.examples), ("bytes", self.bytes)) if v is not None]
        return (", ".join(parts) or "nothing") + (" (inputs only)" if self.inputs else "")


NOTHING = Budget()
ALL = Budget(all=True)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that a phase reads: pure data. ``rows`` are int64 indices into the training rows of ``stage``, or
    records (a tuple of dicts as a stage's source gives them). ``share``: how often rows are
    drawn: 1 draws every row once per epoch, 0.1 a tenth of that, 2 each row twice. ``into='main'`` mixes
    into the batch, any other name nests a batch of the same size under that key."""

    stage: int
    rows: Any
    share: float = 1.0
    into: str = "main"


def weighted_nll(ctx: Ctx) -> jax.Array:
    """sum(weight * nll) / max(sum(weight), 1): the base objective. The divisor comes after all weighs."""
    return jnp.sum(ctx.weight * ctx.out.nll) / jnp.maximum(jnp.sum(ctx.weight), 1.0)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training inside a stage. ``steps`` None: as many as its main streams' rows need for
    ``epochs``. ``train``: path patterns that narrow what is trained. ``tx``: another optimizer than the
    experiment's. ``active``: methods whose in-step slots run (None: all). ``collect_every``: above 0, a batch of
    the streams is made into a rollout by a method's `collect`, which serves this many steps. ``after``: host code
    behind the last step, with the memory of the method that planned it (``by``, filled in by the core)."""

    name: str
    steps: int | None
    streams: tuple[Stream, ...]
    epochs: float = 1.0
    objective: Callable[[Ctx], jax.Array] = weighted_nll
    train: tuple[str, ...] | None = None
    tx: Any = None
    reset_opt: bool = True
    active: frozenset[str] | None = None
    collect_every: int = 0
    after: Callable[[World, Own], tuple[World, Own]] | None = None
    by: str = ""


class Tools(NamedTuple):
    """What host code of a method may use between phases. All of it reads *training* rows only, and but for `kept`
    those of the present stage.

    batches(stage, n) -> iterator of batches over n rows drawn without replacement (all where None).
    mean(fn, n, key) -> tree: mean over n rows of the current stage of
        ``fn(forward, train, row_batch, key) -> tree``, f32, one row at a time and so exact for Fisher, MAS and
        second moments. ``forward(train, batch)`` gives Outputs without dropout and is differentiable in
        ``train``; ``forward.logits(train, out, at)`` gives logits. ``fn`` must be one stable object.
    each(fn, key, n) -> tree of numpy arrays [N, ...]: the same ``fn`` for the first n rows of the stage (all where
        None), in the rows' order; N is the largest stage's size, the rest zeros; n = 0 gives the shape alone.
    kept(stage, rows) -> iterator of batches of past rows that the method may hold (`keeps`), once, in order.
    call(fn, batch, key) -> tree: ``fn(forward, train, batch, key)`` once, jitted, on any batch of arrays.
        ``forward.generate(train, prompts, lengths, ...)`` samples, see `jaxcl.models.generate.generate`.
    size(stage) -> number of training rows. labels(stage) -> a string per row (class or task). row_bytes(stage) -> bytes
        of one row's arrays, which are of one shape in a stage.
    """

    batches: Callable[..., Any]
    mean: Callable[..., Any]
    each: Callable[..., Any]
    kept: Callable[..., Any]
    call: Callable[..., Any]
    size: Callable[[int], int]
    labels: Callable[[int], np.ndarray]
    row_bytes: Callable[[int], int]


class World(NamedTuple):
    """Everything between phases, on the host. ``edits``: surgeries done in this stage so far, in order. ``notes``: JSON
    that ends up in metrics.json. ``owner``: {path: method that made this parameter}."""

    spec: Any
    params: Params
    trained: frozenset[str]
    stage: int
    phase: int
    key: jax.Array
    tools: Tools
    notes: Mapping[str, Any]
    edits: tuple[Any, ...]
    owner: Mapping[str, str] = {}


GradFn = Callable[..., tuple[Params, dict[str, Any]]]
"""(train, batch, key, *, terms=True) -> (grads, aux); accumulates whatever batch it gets; ``terms=False``
is the objective alone. The one that a `grad` decorates is a `Gradient`."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A GradFn, called as one, with what a decorator may ask for beside it. ahead(train, grads) -> train: where the
    optimizer's next step with these gradients would lead, projections included; its state stays as it is.
    forward(train, batch) -> Outputs: the wrapped model without dropout."""

    of: GradFn
    ahead: Callable[[Params, Params], Params]
    forward: Callable[[Params, Batch], Outputs]

    def __call__(self, *args: Any, **how: Any) -> tuple[Params, dict[str, Any]]:
        return self.of(*args, **how)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A continual-learning method: a record of optional pure functions. See docs/protocol.md for the laws.

    name: also its key in State, Fixed and the log. hparams: JSON, filled by `@method`. taps: activations
    it reads. keeps: what of past stages it may hold. packs: whether sequences may share a row.
    kinds: {top-level name of its own memory: 'value' | 'gradient' | 'square' | 'mask', or 'sites' for a list of dense
    sites}, so that a surgery's Edit knows how to carry it; only entries whose keys are parameter paths need one.
    After a surgery `init` is asked again, for the entries of new tensors alone.
    """

    name: str
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taps: tuple[str, ...] = ()
    keeps: Budget = NOTHING
    packs: bool = True
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # between phases, on the host
    begin: Callable[[World, Own | None], tuple[World, Own]] | None = None
    mask: Callable[[World, Own], dict[str, bool]] | None = None
    init: Callable[[World], Own] | None = None
    plan: Callable[[World, Own, list[Phase]], list[Phase]] | None = None
    fold: Callable[[Params, Own, Batch], Params] | None = None
    collect: Callable[[World, Own, Batch, jax.Array], tuple[Batch, Own]] | None = None
    end: Callable[[World, Own], tuple[World, Own]] | None = None
    # inside the jitted step
    wrap: Callable[[Apply, Any, Clock], Apply] | None = None
    weigh: Callable[[Ctx], jax.Array] | None = None
    loss: Callable[[Ctx], dict[str, jax.Array]] | None = None
    grad: Callable[[Gradient, Any, Clock], GradFn] | None = None
    project: Callable[[Params, Params, Any, Clock], Params] | None = None
    observe: Callable[[Ctx, Params, Params, Params], Any] | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that are filled, in the order of the protocol."""
        names = "begin mask init plan fold collect end wrap weigh loss grad project observe"
        return tuple(n for n in names.split() if getattr(self, n) is not None)


def method(build: Callable[..., Method]) -> Callable[..., Method]:
    """Decorator on a method's constructor: fills ``hparams`` with the arguments it was called with.

    The arguments must be plain values (numbers, strings, booleans, None, lists and dicts of them).
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def constructor(*args: Any, **kwargs: Any) -> Method:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        made = build(*args, **kwargs)
        return dataclasses.replace(made, hparams={**bound.arguments, **made.hparams})

    return constructor


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class State:
    """What changes every step: donated, saved often. live: {method: its live memory}."""

    clock: Clock
    train: Params
    opt: Any
    live: dict[str, Any]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What is constant for a phase: never donated, saved once. own: {method: its fixed memory}."""

    frozen: Params
    own: dict[str, Any]
