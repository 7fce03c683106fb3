"""EWC in an optax loop of one's own: the Fisher and the penalty are plain functions of any pytree of parameters.

Two tasks on one small net: each has words of its own, pairs of the same letters, and an answer to every word. Task 2
is trained after task 1, with and without the penalty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.losses.fisher import empirical
from jaxcl.losses.penalties import quadratic

LETTERS, ANSWERS, TIMES, WRONG = 8, 8, 8, 0.15
WIDTH, STEPS, STRENGTHS = 64, 300, (0.0, 10.0, 30.0, 100.0)
TX = optax.adam(3e-3)


class Scores(NamedTuple):
    """What `empirical` asks of a model's outputs: the negative log likelihood of each answer."""

    nll: jax.Array
    logits: jax.Array


def init(seed: int = 0) -> dict[str, Any]:
    """Nested parameters: two tables of embeddings, a list of two dense layers."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape) / np.sqrt(shape[0]))  # noqa: E731
    dense = [{"kernel": draw(WIDTH, n), "bias": jnp.zeros(n)} for n in (WIDTH, ANSWERS)]
    return {"embed": {"first": draw(LETTERS, WIDTH), "second": draw(LETTERS, WIDTH)}, "dense": dense}


def forward(params: Any, batch: dict[str, jax.Array]) -> Scores:
    """Batch: word, answer i32[B]; weight f32[B]."""
    first, last = params["dense"]
    x = params["embed"]["first"][batch["word"] // LETTERS] + params["embed"]["second"][batch["word"] % LETTERS]
    logits = jnp.tanh(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
    return Scores(optax.softmax_cross_entropy_with_integer_labels(logits, batch["answer"]), logits)


def task(number: int) -> dict[str, jax.Array]:
    """The task's words, `TIMES` times each. Some answers are wrong: where a model is never surprised, its gradients
    vanish, and the empirical Fisher with them."""
    rng = np.random.default_rng(number)
    words = np.random.default_rng(2).permutation(LETTERS**2)[number::2]
    truth = np.tile(rng.integers(0, ANSWERS, len(words)), TIMES)
    answer = np.where(rng.random(len(truth)) < WRONG, rng.integers(0, ANSWERS, len(truth)), truth)
    rows = {"word": np.tile(words, TIMES), "answer": answer, "truth": truth}
    return {k: jnp.asarray(v) for k, v in rows.items()} | {"weight": jnp.ones(len(truth))}


@jax.jit
def fisher(params: Any, rows: dict[str, jax.Array]) -> Any:
    """Mean over rows of the squared gradient of each, in the shapes of ``params``."""
    one = lambda row: empirical(forward, params, jax.tree.map(lambda x: x[None], row), jax.random.key(0))  # noqa: E731
    return jax.tree.map(lambda f: jnp.mean(f, axis=0), jax.vmap(one)(rows))


@jax.jit
def step(params: Any, state: Any, rows: dict[str, jax.Array], anchor: Any, weight: Any, strength: float) -> tuple:
    """Adam on mean nll + strength/2 sum_i weight_i (params_i - anchor_i)^2."""
    loss = lambda p: jnp.mean(forward(p, rows).nll) + strength * quadratic(p, anchor, weight)  # noqa: E731
    updates, state = TX.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def fit(params: Any, rows: dict[str, jax.Array], anchor: Any, weight: Any, strength: float) -> Any:
    state = TX.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, rows, anchor, weight, strength)
    return params


def accuracy(params: Any, rows: dict[str, jax.Array]) -> float:
    return float(jnp.mean(jnp.argmax(forward(params, rows).logits, -1) == rows["truth"]))


def main() -> dict[str, dict[str, Any]]:
    """{run: its parameters and its row of the table}; prints the table."""
    old, new, start = task(0), task(1), init()
    anchor = fit(start, old, start, jax.tree.map(jnp.zeros_like, start), 0.0)
    weight = fisher(anchor, old)
    found = {"task 1": {"params": anchor, "fisher": weight}}
    found |= {f"task 2, strength {s:g}": {"params": fit(anchor, new, anchor, weight, s)} for s in STRENGTHS}
    print(f"{'accuracy after':24}{'task 1':>8}{'task 2':>8}{'1/2 sum F d^2':>16}")
    for name, row in found.items():
        row |= {"old": accuracy(row["params"], old), "new": accuracy(row["params"], new)}
        row["penalty"] = float(quadratic(row["params"], anchor, weight))
        print(f"{name:24}{row['old']:8.2f}{row['new']:8.2f}{row['penalty']:16.4f}")
    return found


if __name__ == "__main__":
    main()
