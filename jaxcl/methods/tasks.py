"""What every task has for itself: a live tensor that trains, a frozen bank of those before it, and each row's choice.

Used by methods whose adapters are told the task (prompts, prefixes, factors, bottlenecks). The bank of ``key`` is
``key_bank``, [S, ...] with one slot a task; the task in training is in no slot until the next stage begins, so that it
never counts twice. The model gets a tensor for each row, [B, ...] in place of [...]. A stacked tensor has the layers'
axis in front of all that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.paths import is_stacked, per_tensor
from jaxcl.core.types import Apply, Batch, Clock, Outputs, Own, Params, World
from jaxcl.errors import RequestError
from jaxcl.surgery.edit import restart

BANK = "_bank"
UNTOLD = "needs to be told the task (task_id); make the experiment task-incremental: jaxcl.til(Experiment(...))"


def check_told(world: World, name: str) -> None:
    """RequestError unless the rows of this stage say their task."""
    if "task_id" not in next(world.tools.batches(world.stage, 1)):
        raise RequestError(f"method {name!r} {UNTOLD}")


def check_stages(max_stages: int, name: str) -> None:
    """RequestError for a bank without a slot."""
    if max_stages < 1:
        raise RequestError(f"{name}: max_stages is {max_stages}; accepted: a whole number of at least 1")


def live(params: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """The keys whose last part is one of ``names``, sorted."""
    return sorted(k for k in params if k.rpartition("/")[2] in names)


def opened(world: World, keys: Iterable[str], slots: int) -> tuple[World, Own]:
    """The world with an empty bank for each key, and the memory of the first task."""
    banks = {}
    for key in keys:
        lead = int(is_stacked(key))
        shape = world.params[key].shape
        banks[key + BANK] = jnp.zeros((*shape[:lead], slots, *shape[lead:]), world.params[key].dtype)
    return world._replace(params={**world.params, **banks}), memory(1)


def memory(tasks: int) -> Own:
    """How many tasks there are, the one in training included."""
    return {"fixed": {"tasks": jnp.int32(tasks)}, "host": {"tasks": tasks}}


def next_task(world: World, own: Own, fresh: Mapping[str, jax.Array], grow: bool, name: str) -> tuple[World, Own]:
    """The live tensors into their banks, and ``fresh`` ones in their place: an Edit, which all memories follow.

    A full bank doubles, which is one new compilation; RequestError instead where ``grow`` is false.
    """
    tasks, banks = own["host"]["tasks"], {}
    for key in fresh:
        bank, axis = world.params[key + BANK], int(is_stacked(key))
        if tasks >= bank.shape[axis]:  # the next one needs a slot too: rows choose among all of them
            if not grow:
                most = bank.shape[axis]
                raise RequestError(f"{name}: task {tasks + 1} exceeds max_stages={most}; raise it, or set grow to true")
            bank = jnp.concatenate([bank, jnp.zeros_like(bank)], axis)
        banks[key + BANK] = bank.at[(slice(None),) * axis + (tasks - 1,)].set(world.params[key])
    world = world._replace(params={**world.params, **banks})
    return restart(world, fresh), memory(tasks + 1)


def weights(batch: Batch, slots: int, tasks: jax.Array, field: str = "task_id") -> jax.Array:
    """f32[B,S], how much of every slot's tensor a row has: ``bank_weight`` where the batch has it, else 1 at its task
    and nothing at all for a task that is not learned yet, or none (`jaxcl.core.til.NO_TASK`)."""
    if "bank_weight" in batch:
        return batch["bank_weight"]
    task = batch[field]
    return jax.nn.one_hot(jnp.where(task < tasks, task, -1), slots, dtype=jnp.float32)


def by_task(
    name: str, keys_of: Callable[[Params], list[str]], put: Callable[[Params, jax.Array, jax.Array], Params]
) -> Callable[[Apply, Own, Clock], Apply]:
    """The `wrap` of a method whose rows say their task: the model runs on ``put(params, share f32[B,S], tasks i32[])``,
    ``params`` with each row's own tensors at the keys. RequestError for rows that say neither task nor weights."""

    def wrap(apply: Apply, own: Own, clock: Clock) -> Apply:
        if not own["fixed"]:  # before the first task there is nothing to choose from
            return apply

        def chosen(spec: Any, params: Params, batch: Batch, **kw: Any) -> Outputs:
            if "task_id" not in batch and "bank_weight" not in batch:
                raise RequestError(f"method {name!r} {UNTOLD}")
            tasks = own["fixed"]["tasks"]
            share = weights(batch, slots_of(params, keys_of(params)), tasks)
            return apply(spec, put(params, share, tasks), batch, **kw)

        return chosen

    return wrap


def slots_of(params: Params, keys: Iterable[str]) -> int:
    """S of the banks of these keys."""
    key = next(iter(keys))
    return params[key + BANK].shape[int(is_stacked(key))]


def full(bank: jax.Array, value: jax.Array, tasks: jax.Array) -> jax.Array:
    """The bank [S, ...] with the live tensor in the slot of the task in training."""
    return bank.at[tasks - 1].set(value)


def of_rows(params: Params, keys: Iterable[str], share: jax.Array, tasks: jax.Array) -> Params:
    """{key: [B, ...]}, each row's own mixture of the tasks' tensors by ``share`` f32[B,S]; exact where one is 1."""

    def rows(bank: jax.Array, value: jax.Array) -> jax.Array:
        chosen: Any = jnp.tensordot(share, full(bank, value, tasks), axes=1, precision=jax.lax.Precision.HIGHEST)
        return chosen.astype(value.dtype)

    return {key: per_tensor(rows, key, params[key + BANK], params[key]) for key in keys}
