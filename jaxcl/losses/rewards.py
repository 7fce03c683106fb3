"""Rewards that can be checked by hand: pure functions of a response, by name or of your own.

A reward is ``reward(response i32[B,N], mask f32[B,N], rows) -> f32[B]``, traced inside the rollout: ``mask`` is 1 on
the response's tokens, the end mark included; ``rows`` is the batch that the prompts came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Batch
from jaxcl.errors import RequestError, unknown

Reward = Callable[[jax.Array, jax.Array, Batch], jax.Array]


def token(number: int) -> Reward:
    """How often the token ``number`` stands in the response."""
    return lambda response, mask, rows: jnp.sum(mask * (response == number), axis=1)


def length(number: int) -> Reward:
    """-|tokens of the response - number|."""
    return lambda response, mask, rows: -jnp.abs(jnp.sum(mask, axis=1) - number)


def target_match(number: int = 0) -> Reward:
    """1 where the response is the row's own target, all of it and no more, else 0."""

    def reward(response: jax.Array, mask: jax.Array, rows: Batch) -> jax.Array:
        wanted, real = targets(rows)
        width = max(response.shape[1], wanted.shape[1])
        fill = lambda x, on: jnp.pad(jnp.where(on > 0, x, -1), ((0, 0), (0, width - x.shape[1])), constant_values=-1)  # noqa: E731
        return jnp.all(fill(response, mask) == fill(wanted, real), axis=1).astype(jnp.float32)

    return reward


def targets(rows: Batch) -> tuple[jax.Array, jax.Array]:
    """(tokens i32[B,K], mask [B,K]) of the rows' own targets, moved to the front."""
    weight = rows["weight"]
    here = jnp.broadcast_to(jnp.arange(rows["tokens"].shape[1]), rows["tokens"].shape)
    at = rows.get("targets_at", here)
    order = jnp.argsort(weight <= 0, axis=1, stable=True)
    at, weight = (jnp.take_along_axis(x, order, axis=1) for x in (at, weight))
    return jnp.take_along_axis(rows["tokens"], at, axis=1), weight


REWARDS: dict[str, Callable[..., Reward]] = {"token": token, "length": length, "target_match": target_match}


def named(what: str | Reward, where: str) -> tuple[str, Reward]:
    """(its name for the record, the reward) of ``'token:65'``, ``'length:20'``, ``'target_match'`` or a function, whose
    name is its ``name`` or ``__name__``. Raises RequestError for an unknown name or a number that is none."""
    if not isinstance(what, str):
        found: Any = getattr(what, "name", None) or getattr(what, "__name__", None)
        if not callable(what) or not isinstance(found, str):
            known = ", ".join(REWARDS)
            raise RequestError(f"{where}: reward {what!r}; accepted: {known}, or a function with a name")
        return found, what
    kind, colon, number = what.partition(":")
    if kind not in REWARDS:
        raise unknown("reward", kind, REWARDS, where=where)
    if (kind == "target_match") == bool(colon) or (colon and not number.isdecimal()):
        example = "target_match" if kind == "target_match" else f"{kind}:65"
        raise RequestError(f"{where}: reward {what!r}; accepted: {example!r}, a whole number where there is a colon")
    return what, REWARDS[kind](int(number)) if colon else REWARDS[kind]()


def each_stage(given: str | Reward | Sequence[str | Reward], where: str) -> tuple[list[str], list[Reward]]:
    """(names, rewards) of one for all stages, or of one for each. RequestError: an empty list; see `named`."""
    listed = [given] if isinstance(given, str) or callable(given) else list(given)
    if not listed:
        raise RequestError(f"{where}: no reward; accepted: a name or function, or a list with one for each stage")
    found = [named(r, where) for r in listed]
    return [n for n, _ in found], [r for _, r in found]
