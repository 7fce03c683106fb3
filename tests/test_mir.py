"""MIR: the step ahead, the ranking on a toy in closed form, the joint gradient, and the least losses of s2."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, Answers, relative, run, same, to_numpy, weights

from jaxcl.core.step import make_step
from jaxcl.core.types import Clock, Fixed, Gradient, Method, Outputs, Phase, State
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.mir import mir, tables

rng = np.random.default_rng(0)
LR = 0.1

# A toy: theta in R^2, the loss of row (a, y) is 1/2 (a theta - y)^2.


def rows(n: int, stage: int = 0, target: bool = True) -> dict:
    a, y = rng.normal(size=(n, 2)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    weight = np.full((n, 1), float(target), np.float32)
    return {"tokens": a, "y": y, "weight": weight, "stage": np.full(n, stage), "row": np.arange(n)}


def loss(theta: np.ndarray, batch: dict) -> np.ndarray:
    return 0.5 * (batch["tokens"] @ theta - batch["y"]) ** 2


class Toy:
    """A gradient of the toy that notes what it was asked for; a step ahead is one of plain descent."""

    def __init__(self):
        self.asked: list[dict] = []
        self.gradient = Gradient(self.of, lambda t, g: {"w": t["w"] - LR * g["w"]}, self.forward)

    def forward(self, train, batch):
        return Outputs(nll=0.5 * (batch["tokens"] @ train["w"] - batch["y"])[:, None] ** 2)

    def of(self, train, batch, key, *, terms=True):
        self.asked.append(batch)
        weight = batch["weight"][:, 0]
        grad = (weight * (batch["tokens"] @ train["w"] - batch["y"])) @ batch["tokens"] / weight.sum()
        objective = jnp.sum(weight * self.forward(train, batch).nll[:, 0]) / weight.sum()
        return {"w": grad}, {"terms": {"objective": objective}, "weight": weight.sum(), "out": {"aux": {}}}


def asked(method: Method, batch: dict, theta: np.ndarray, own=None) -> tuple[dict, dict, list[dict]]:
    """(gradient, aux, the batches whose gradient was taken), run without tracing: conditions are decided."""
    toy = Toy()
    with jax.disable_jit():
        grad = method.grad(toy.gradient, own, Clock.at())
        grads, aux = grad({"w": jnp.asarray(theta)}, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    return grads, aux, toy.asked


THETA = np.array([0.5, -1.0], np.float32)


def ahead(new: dict) -> np.ndarray:
    residual = new["tokens"] @ THETA - new["y"]
    return THETA - LR * residual @ new["tokens"] / len(residual)


def test_the_rows_whose_loss_rises_most_are_replayed():
    new, first, second = rows(4, stage=1), rows(4), rows(4)
    _, _, took = asked(mir(candidates=2, rows=3), new | {"mir/0": first, "mir/1": second}, THETA)
    pool = {k: np.concatenate([first[k], second[k]]) for k in first}
    scores = loss(ahead(new), pool) - loss(THETA, pool)
    best = np.argsort(-scores)[:3]
    np.testing.assert_array_equal(took[1]["tokens"], pool["tokens"][best])
    assert not np.array_equal(best, np.argsort(-loss(ahead(new), pool))[:3]), "the largest loss is another rule"


def test_the_gradient_is_that_of_new_and_old_rows_in_one_batch():
    """As many candidates as are replayed: plain replay of the same rows."""
    new, old = rows(4, stage=1), rows(4)
    grads, aux, _ = asked(mir(candidates=1), new | {"mir/0": old}, THETA)
    both = {k: np.concatenate([new[k], old[k]]) for k in new}
    want = (both["tokens"] @ THETA - both["y"]) @ both["tokens"] / 8
    np.testing.assert_allclose(grads["w"], want, rtol=1e-5)
    np.testing.assert_allclose(aux["terms"]["objective"], loss(THETA, both).mean(), rtol=1e-5)
    assert aux["weight"] == 8


def test_ties_go_to_the_lowest_index_and_rows_without_targets_come_last():
    new, one = rows(2, stage=1), rows(1)
    blank = rows(3, target=False)
    equal = {k: np.repeat(v, 3, axis=0) for k, v in one.items()} | {"row": np.arange(3)}
    pool = {k: np.concatenate([blank[k], equal[k]]) for k in one}
    _, _, took = asked(mir(candidates=1, rows=2), new | {"mir/0": pool}, THETA)
    assert took[1]["row"].tolist() == [0, 1] and took[1]["weight"].all()
    _, _, took = asked(mir(candidates=1, rows=4), new | {"mir/0": pool}, THETA)
    assert took[1]["weight"].ravel().tolist() == [1, 1, 1, 0]


def test_without_a_memory_the_step_is_the_plain_one():
    new = rows(4, stage=1)
    grads, aux, took = asked(mir(candidates=2), new | {f"mir/{i}": rows(4, target=False) for i in range(2)}, THETA)
    plain, _ = Toy().of({"w": jnp.asarray(THETA)}, new, None)
    assert len(took) == 1 and np.array_equal(grads["w"], plain["w"]) and aux["weight"] == 4


def test_s2_compares_with_the_least_loss_so_far():
    new, old, method = rows(4, stage=1), rows(6), mir(candidates=1, rows=2, capacity=8, score="s2")
    table = np.full((8, 2), -2, np.int32)
    table[:5] = np.stack([np.zeros(5), [4, 2, 0, 1, 3]], 1)  # row 5 is in no slot
    least = np.full(8, np.inf, np.float32)
    least[:3] = [0.0, 1e3, 0.01]  # of rows 4, 2 and 0
    own = {"fixed": {"slots": jnp.asarray(table)}, "live": {"best": jnp.asarray(least)}}
    _, aux, took = asked(method, new | {"mir/0": old}, THETA, own)
    now, known = loss(THETA, old), np.array([0.01, np.inf, 1e3, np.inf, 0.0, np.inf])
    scores = loss(ahead(new), old) - np.minimum(now, known)
    assert took[1]["row"].tolist() == np.argsort(-scores)[:2].tolist()
    ctx = SimpleNamespace(own=own, batch=new | {"mir/0": old}, out=SimpleNamespace(aux=aux["out"]["aux"]))
    after = method.observe(ctx, None, None, None)["best"]
    want = least.copy()
    for row, slot in zip([4, 2, 0, 1, 3], range(5)):
        want[slot] = min(want[slot], now[row])
    np.testing.assert_allclose(after, want, rtol=1e-5)


def test_least_losses_follow_the_rows_that_stay():
    empty = {"seen": 0, "class_seen": [], "full": [], "classes": ["c"], "starts": [0]}
    hosts = [empty | {"rows": np.array(r), "codes": np.zeros(len(r), np.int64)} for r in ([1, 5, 7], [5, 6, 1])]
    old = {"host": hosts[0], "live": {"best": jnp.array([0.1, 0.5, 0.7, jnp.inf])}}
    got = tables(hosts[1], 4, old)
    assert got["fixed"]["slots"].tolist() == [[0, 1], [0, 5], [0, 6], [-2, -2]]
    np.testing.assert_allclose(got["live"]["best"], [0.1, 0.5, np.inf, np.inf])


# the step ahead, in the real step


@pytest.fixture(scope="module")
def batch() -> dict:
    found = next(batches(Answers("s", 8, seed=3), None, 8))
    return found | dict.fromkeys(("source", "stage"), np.zeros(8, np.int32))


def test_a_step_ahead_is_the_step_that_follows_and_leaves_no_trace(batch):
    """Adam with moments of three steps and a projection behind it; what was looked at goes into the log."""

    def looking(grad_fn, own, clock):
        def looked(train, batch, key, *, terms=True):
            grads, aux = grad_fn(train, batch, key, terms=terms)
            future = grad_fn.ahead(train, grads)
            moved = {k: jnp.sum(v * (1 + jnp.arange(v.size).reshape(v.shape) % 7)) for k, v in future.items()}
            nll = jnp.sum(grad_fn.forward(future, batch).nll)
            return grads, aux | {"terms": aux["terms"] | {"ahead": 0.0 * nll + sum(moved.values())}}

        return looked

    def halved(updates, params, own, clock):
        return {k: 0.5 * u for k, u in updates.items()}

    half = Method(name="half", project=halved)
    look = Method(name="look", grad=looking)
    outer = Method(name="outer", grad=lambda grad_fn, own, clock: lambda *a, **k: grad_fn(*a, **k))
    tx, states = optax.adam(1e-2), {}
    for name, methods in {"plain": [half], "looking": [half, look, outer]}.items():
        step = jax.jit(make_step(MODEL.apply, SPEC, methods, tx, Phase("train", 1, ())))
        state = State(Clock.at(phase_len=9), weights(), tx.init(weights()), {})
        for _ in range(3):
            state, metrics = step(state, Fixed({}, {}), batch, np.uint32(0))
        states[name] = to_numpy(state)
    plain, looked = states["plain"], states["looking"]
    assert relative(looked.train, plain.train) < 1e-6 and relative(looked.opt[0].mu, plain.opt[0].mu) < 1e-5
    assert int(looked.opt[0].count) == 3
    factor = {k: 1 + np.arange(v.size).reshape(v.shape) % 7 for k, v in looked.train.items()}
    want = sum(np.sum(v * factor[k], dtype=np.float64) for k, v in looked.train.items())
    np.testing.assert_allclose(metrics["ahead"], want, rtol=1e-4)


def test_a_run_replays_from_the_second_stage_on(tmp_path):
    plain = run([], tmp_path / "plain", n=2)
    done = run([mir(candidates=2, capacity=12, score="s2")], tmp_path / "mir", n=2)
    assert np.array_equal(done.losses(0), plain.losses(0)) and done.compilations == 1
    first, second = ([r["weight"] for r in done.log if r["stage"] == i] for i in (0, 1))
    alone = [r["weight"] for r in plain.log]
    assert first == alone[: len(first)] and all(a > b for a, b in zip(second, alone[len(first) :], strict=True))
    assert not same(done.params, plain.params)
    own = done.loop.now.owns["mir"]
    best, slots = np.asarray(own["live"]["best"]), np.asarray(own["fixed"]["slots"])
    assert np.isfinite(best[slots[:, 0] == 0]).all() and np.isinf(best[slots[:, 0] != 0]).all()


def test_more_rows_than_candidates_and_rows_that_do_not_split_are_refused(tmp_path):
    with pytest.raises(RequestError, match="rows is 9; accepted: up to the 8 candidates"):
        run([mir(candidates=1, rows=9)], tmp_path / "out", n=1)
    with pytest.raises(RequestError, match="3 rows does not split into accumulate=2"):
        run([mir(candidates=1, rows=3)], tmp_path / "odd", n=1, accumulate=2)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"candidates": 0}, "candidates 0"),
        ({"rows": 0}, "rows 0"),
        ({"capacity": -1}, "capacity is -1"),
        ({"score": "s3"}, "accepted: s1, s2"),
        ({"policy": "lifo"}, "unknown policy 'lifo'"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        mir(**arguments)


def test_a_gradient_is_called_as_a_function():
    assert Gradient(lambda x, *, terms: (x, terms), None, None)(1, terms=False) == (1, False)
    assert {f.name for f in dataclasses.fields(Gradient)} == {"of", "ahead", "forward"}
