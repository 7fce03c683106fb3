"""A user's own Flax module, NNX or Linen, as a Model over the flat dict."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from ..core.types import Batch, Model, Outputs, Params
from ..errors import RequestError
from .nll import batch_nll

Logits = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class FlaxSpec:
    """The static part of a foreign module: only its name, its shape is in the module."""

    name: str


class _Taken(NamedTuple):
    """params: the flat dict. rebuild(params) gives the module back, with these numbers in it."""

    params: Params
    rebuild: Callable[[Params], Any]


def from_flax(module: Any, *, logits: Logits, spec: Any = None) -> tuple[Model, Params]:
    """(Model, Params) of an NNX module, or of a Linen module bound to its variables (``module.bind(variables)``).

    logits(module, batch) -> [B,T,V]: the scores of the token *after* each position; ``batch`` as in
    `jaxcl.core.types.Batch`, and it is this function's business to keep packed sequences and padding apart. If it has
    parameters named ``train`` or ``key`` it is given them (dropout). spec: any hashable value of yours, else the
    module's name. Parameters are the module's nnx.Param or its 'params' collection, under their own paths joined by
    '/'; what else it holds (batch statistics, random counters) stays as given. ``init`` returns the weights the module
    came with.

    The nll is that of the decoder; ``hidden`` holds the logits and ``head`` picks from them. There are no taps and
    there is no cache, so evaluators that need one refuse such a model; both raise RequestError, and so does a module
    that is neither, or a Linen module without variables.
    """
    params, rebuild = _taken(module)
    passed = {"train", "key"} & set(inspect.signature(logits).parameters)

    def apply(
        spec: Any,
        params: Params,
        batch: Batch,
        *,
        cache: Any = None,
        taps: tuple[str, ...] = (),
        train: bool = False,
        key: jax.Array | None = None,
        inject: Any = None,
        start: Any = None,
    ) -> Outputs:
        if cache is not None or taps or inject or start:
            asked = "a key-value cache" if cache is not None else f"tap {taps[0]!r}" if taps else "an injection"
            raise RequestError(
                f"{type(module).__name__} cannot give {asked}; accepted: losses and nll of whole sequences"
            )
        given = {"train": train, "key": key}
        scores = logits(rebuild(params), batch, **{name: given[name] for name in passed}).astype(jnp.float32)
        return Outputs(nll=batch_nll(lambda rows: rows, scores, batch, chunk=batch["tokens"].size), hidden=scores)

    model = Model(
        spec=FlaxSpec(type(module).__name__) if spec is None else spec,
        init=lambda spec, key: dict(params),
        apply=apply,
        head=lambda spec, params, hidden, at: jnp.take_along_axis(hidden, at[..., None], axis=1),
        axes=lambda spec, params: {path: (None,) * jnp.ndim(leaf) for path, leaf in params.items()},
    )
    return model, params


def into_flax(module: Any, params: Params) -> Any:
    """A copy of a module as `from_flax` takes it, with these numbers; keys that methods added beside are left out."""
    return _taken(module).rebuild(params)


def _taken(module: Any) -> _Taken:
    if isinstance(module, nnx.Module):
        return _nnx(module)
    if isinstance(module, linen.Module):
        return _linen(module)
    raise RequestError(f"{type(module).__name__} is no Flax module; accepted: an nnx.Module or a bound linen.Module")


def _nnx(module: nnx.Module) -> _Taken:
    graph, *parts = nnx.split(module, nnx.Param, ...)
    state, rest = parts
    leaves = {"/".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}

    def rebuild(params: Params) -> nnx.Module:
        flat = [(path, leaf.replace(params[name])) for name, (path, leaf) in leaves.items()]
        return nnx.merge(graph, nnx.from_flat_state(flat), rest, copy=True)

    return _Taken({name: leaf[...] for name, (_, leaf) in leaves.items()}, rebuild)


def _linen(module: linen.Module) -> _Taken:
    if module.scope is None:
        raise RequestError(f"{type(module).__name__} has no variables; accepted: module.bind(variables)")
    free, variables = module.unbind()
    rest = {name: values for name, values in variables.items() if name != "params"}
    flat = traverse_util.flatten_dict(variables["params"], sep="/")

    def rebuild(params: Params) -> linen.Module:
        known = {name: params[name] for name in flat}
        return free.bind({**rest, "params": traverse_util.unflatten_dict(known, sep="/")})

    return _Taken(dict(flat), rebuild)
