"""The row memory of replay, MIR, DER, A-GEM and GEM: which rows of past stages are held, as indices, not tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.types import Batch, Own, Params, World
from jaxcl.data.reservoir import Memory, class_balanced, herding, reservoir, ring
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.positions import prompt_end

STREAMED: dict[str, Callable] = {"reservoir": reservoir, "class_balanced": class_balanced, "ring": ring}
NOWHERE = -2  # neither a stage nor a row: a slot that nothing is in
POLICIES = (*STREAMED, "herding")
"""Herding asks the model as it is at the stage's end: the last hidden state at a prompt's end is a row's feature."""


def check(name: str, policy: str, **counts: float) -> None:
    """Raises RequestError for an unknown policy or for a count that is no whole number of at least 0."""
    for key, value in counts.items():
        if value < 0 or value != int(value):
            raise RequestError(f"{name}: {key} is {value}; accepted: a whole number of at least 0")
    if policy not in POLICIES:
        raise unknown("policy", policy, POLICIES, where=name)


def empty(world: World) -> Own:
    """The `init` of a method with a row memory."""
    return {"host": store(Memory.empty(), [])}


def remember(world: World, own: Own, policy: str, capacity: int, seed: int) -> Own:
    """The memory after the rows of the current stage, each offered once, in their order."""
    memory, starts = load(own["host"])
    starts = [*starts, memory.seen]  # the stream of all stages is one; this stage starts here
    labels = [str(label) for label in world.tools.labels(world.stage)]
    if policy == "herding":
        features = world.tools.each(feature, world.key)[: len(labels)].astype(np.float64)
        return {"host": store(herding(memory, labels, capacity, features), starts)}
    return {"host": store(STREAMED[policy](memory, labels, capacity, seed), starts)}


def feature(forward: Any, train: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """f32[D] of one row: the last hidden state at the last token of its prompt."""
    return forward(train, batch).hidden[0, prompt_end(batch)[0]].astype(jnp.float32)


def store(memory: Memory, starts: list[int]) -> dict[str, Any]:
    """A memory as numpy and JSON; ``starts``: where each stage begins in the stream of all stages."""
    plain = {k: v for k, v in dataclasses.asdict(memory).items() if k not in ("items", "labels")}
    classes = sorted(set(memory.labels.tolist()))
    codes = np.array([classes.index(c) for c in memory.labels.tolist()], np.int64)
    arrays = {"rows": memory.items, "codes": codes} if len(memory.items) else {}
    return {**plain, "classes": classes, "starts": starts, **arrays}


def load(host: dict[str, Any]) -> tuple[Memory, list[int]]:
    """The inverse of `store`."""
    rows = host.get("rows", np.zeros(0, np.int64))
    labels = np.array([host["classes"][c] for c in host.get("codes", ())], np.str_)
    seen = tuple((str(c), int(n)) for c, n in host["class_seen"])
    return Memory(rows, labels, int(host["seen"]), seen, tuple(host["full"])), list(host["starts"])


def by_stage(host: dict[str, Any]) -> dict[int, np.ndarray]:
    """{stage: sorted int64 rows of it in memory}, stages in order."""
    memory, starts = load(host)
    stage = np.searchsorted(np.array(starts, np.int64), memory.items, side="right") - 1
    return {int(s): np.sort(memory.items[stage == s] - starts[s]) for s in np.unique(stage)}


# what is known of every row in memory, by slot


def listed(host: dict[str, Any]) -> np.ndarray:
    """int64[n, 2]: (stage, row) of what the memory holds, in order."""
    pairs = [(s, r) for s, rows in by_stage(host).items() for r in rows]
    return np.array(pairs, np.int64).reshape(-1, 2)


def slots(host: dict[str, Any], capacity: int) -> np.ndarray:
    """i32[capacity, 2]: the (stage, row) in every slot, in order, then slots that nothing is in."""
    held, out = listed(host), np.full((capacity, 2), NOWHERE, np.int32)
    out[: len(held)] = held
    return out


def moved(old: dict[str, Any], new: dict[str, Any], capacity: int) -> np.ndarray:
    """int64[capacity]: for every slot of the new memory the one that its row had in the old, -1 for rows that come."""
    was, where = {tuple(pair): i for i, pair in enumerate(listed(old).tolist())}, np.full(capacity, -1)
    now = listed(new).tolist()
    where[: len(now)] = [was.get(tuple(pair), -1) for pair in now]
    return where


def slot_of(slots: jax.Array, batch: Batch) -> jax.Array:
    """i32[B]: the slot of each row of a batch; how many slots there are, which is nowhere, for padding."""
    same = (batch["stage"][:, None] == slots[:, 0]) & (batch["row"][:, None] == slots[:, 1])
    return jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), len(slots))
