"""MoFO and O-LoRA's penalty in a plain Flax training loop: a TrainState over nested parameters, nothing else of jaxcl.

A linear layer has learned task 1 through a low-rank adapter `first`. Task 2 trains `second` on inputs that share
directions with task 1. Four runs: Adam or MoFO, with or without the penalty on the overlap of the two adapters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from jaxcl.losses.penalties import orthogonality
from jaxcl.transforms.mofo import mofo

WIDTH, OUT, RANK, STEPS, FRACTION = 32, 8, 4, 600, 0.15


class Adapter(nn.Module):
    """x -> x A^T B^T with A [rank, in] and B [out, rank]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.param("a", nn.initializers.normal(0.02), (RANK, x.shape[-1]))
        return x @ a.T @ self.param("b", nn.initializers.zeros, (OUT, RANK)).T


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(OUT, name="base")(x) + Adapter(name="first")(x) + Adapter(name="second")(x)


def tasks(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, outputs) of two linear tasks. Task 2 shows each of its causes twice: where task 1 has its inputs, and
    in directions of its own."""
    rng = np.random.default_rng(seed)
    shared, own = np.split(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][: 2 * RANK], 2)
    made = []
    for space in (shared, (shared + own) / np.sqrt(2)):
        cause = rng.normal(size=(256, RANK))
        made.append((np.float32(cause @ space), np.float32(cause @ rng.normal(size=(RANK, OUT)))))
    return made


def mse(params: Any, task: tuple) -> jax.Array:
    return jnp.mean((Net().apply({"params": params}, task[0]) - task[1]) ** 2)


def overlap(params: Any) -> jax.Array:
    return orthogonality(params["second"]["a"], params["first"]["a"][None])


def fit(params: Any, task: tuple, tx: Any, name: str, strength: float = 0.0) -> tuple[Any, int]:
    """`STEPS` steps on a task that train adapter ``name``: (parameters, the most entries that one step moved)."""
    labels = {module: "train" if module == name else "freeze" for module in params}
    only = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=only)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        grads = jax.grad(lambda p: mse(p, task) + strength * overlap(p))(state.params)
        new = state.apply_gradients(grads=grads)
        return new, sum(jnp.sum(a != b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(new.params)))

    moved = []
    for _ in range(STEPS):
        state, count = step(state)
        moved.append(count)
    return state.params, int(max(moved))


def main() -> dict[str, dict[str, Any]]:
    """{run: its parameters and its row of the table}; prints the table."""
    old, new = tasks()
    start = Net().init(jax.random.key(0), old[0])["params"]
    start, _ = fit(start, old, optax.adam(1e-2), "first")
    found: dict[str, dict[str, Any]] = {"start": {"params": start}}
    print(f"before task 2: mean squared error {mse(start, old):.3f} on task 1, {mse(start, new):.3f} on task 2")
    print(f"{'after it, with':20}{'task 1':>8}{'task 2':>8}{'overlap':>9}{'most moved by a step':>22}")
    for strength in (0.0, 0.05):
        for kind, tx in (("Adam", optax.adam(1e-2)), ("MoFO", mofo(1e-2, fraction=FRACTION))):
            params, moved = fit(start, new, tx, "second", strength)
            row = [float(x) for x in (mse(params, old), mse(params, new), overlap(params))]
            name = kind + (" + penalty" if strength else "")
            print(f"{name:20}{row[0]:8.3f}{row[1]:8.3f}{row[2]:9.2f}{moved:22}")
            found[name] = {"params": params, "task 1": row[0], "task 2": row[1], "overlap": row[2], "moved": moved}
    return found


if __name__ == "__main__":
    main()
