"""L2-SP: penalty and decoupled pull against numpy, adapters against their merged kernels, anchors over stages."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import experiment, run, same, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.core.types import Clock
from jaxcl.errors import RequestError
from jaxcl.losses.penalties import square_of_product
from jaxcl.methods.l2_sp import distance, l2_sp
from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora

rng = np.random.default_rng(0)
SHAPES = {"a/kernel": (4, 3), "norm/scale": (4,), "a/bias": (3,), "head/kernel": (3, 2), "frozen/kernel": (2, 2)}


def draw(shapes=SHAPES) -> dict:
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def world(params: dict) -> SimpleNamespace:
    """A model in which a method made the head, and which has a frozen matrix."""
    trained = frozenset(params) - {"frozen/kernel"}
    return SimpleNamespace(params=params, trained=trained, owner={"head/kernel": "another"})


def terms(method, params: dict, own: dict) -> dict:
    return method.loss(SimpleNamespace(params=params, own=own))


def test_the_penalty_against_numpy_and_its_gradient_on_given_matrices_alone():
    start, now, method = draw(), draw(), l2_sp(strength=0.3, beta=0.7)
    own = method.init(world(start))
    got = terms(method, now, own)
    want = 0.15 * np.sum(np.square(to_numpy(now)["a/kernel"] - to_numpy(start)["a/kernel"]))
    np.testing.assert_allclose(got["given"], want, rtol=1e-5)
    np.testing.assert_allclose(got["new"], 0.35 * np.sum(np.square(now["head/kernel"])), rtol=1e-5)
    gradient = jax.grad(lambda p: sum(terms(method, p, own).values()))(now)
    np.testing.assert_allclose(gradient["a/kernel"], 0.3 * (now["a/kernel"] - start["a/kernel"]), rtol=1e-5)
    np.testing.assert_allclose(gradient["head/kernel"], 0.7 * now["head/kernel"], rtol=1e-5)
    assert not any(np.any(gradient[k]) for k in ("norm/scale", "a/bias", "frozen/kernel"))
    at = jax.grad(lambda p: terms(method, p, own)["given"])(start)
    assert terms(method, start, own)["given"] == 0 and not any(np.any(g) for g in at.values())


def steps(tx, form: str, count: int = 5, strength: float = 0.3, **more) -> dict:
    """Weights after a few steps towards somewhere else, the pull in the loss or behind the optimizer."""
    now, goal = dict(START), GOAL
    method = l2_sp(strength=strength, form=form, **more)
    own, state = method.init(world(now)), tx.init(now)
    for step in range(count):
        own_loss = (lambda p: sum(terms(method, p, own).values())) if form == "loss" else (lambda p: 0.0)
        grads = jax.grad(lambda p: sum(jnp.sum((p[k] - goal[k]) ** 2) for k in p) + own_loss(p))(now)  # noqa: B023
        updates, state = tx.update(grads, state, now)
        if form == "decoupled":
            updates = method.project(updates, now, own, Clock.at(phase_step=step))
        now = optax.apply_updates(now, updates)
    return to_numpy(now)


START, GOAL = draw(), draw()


def test_with_sgd_both_forms_take_the_same_steps_and_with_adam_they_do_not():
    sgd = [steps(optax.sgd(0.05), "loss"), steps(optax.sgd(0.05), "decoupled", rate=0.05)]
    assert all(np.allclose(sgd[0][k], sgd[1][k], rtol=1e-5, atol=1e-6) for k in SHAPES)
    adam = [steps(optax.adam(0.05), "loss"), steps(optax.adam(0.05), "decoupled", rate=0.05)]
    assert not np.allclose(adam[0]["a/kernel"], adam[1]["a/kernel"], atol=1e-3)
    np.testing.assert_allclose(adam[0]["norm/scale"], adam[1]["norm/scale"], rtol=1e-5)


def test_a_large_strength_keeps_the_weights_where_they_were():
    now = steps(optax.adam(1e-6), "decoupled", strength=1e6, rate=1e-6)
    assert np.abs(now["a/kernel"] - START["a/kernel"]).max() < 2e-6, "one update away, never two"
    free = steps(optax.adam(1e-6), "decoupled", strength=0.0, rate=1e-6)
    assert np.abs(free["a/kernel"] - START["a/kernel"]).max() > 4e-6


def test_annealing_is_recadams():
    """lambda u - (1 - lambda) eta gamma (theta - theta_0) at every step, beside an optimizer that only scales."""
    rate, gamma, slope, t0 = 0.05, 4.0, 0.5, 2
    got = steps(optax.sgd(0.1), "decoupled", strength=gamma, rate=rate, anneal=t0, slope=slope, beta=0.0)
    theta, start, goal = (np.asarray(t["a/kernel"], np.float64) for t in (START, START, GOAL))
    for step in range(5):
        share = 1 / (1 + np.exp(-slope * (step - t0)))
        theta = theta - share * 0.1 * 2 * (theta - goal) - (1 - share) * rate * gamma * (theta - start)
    np.testing.assert_allclose(got["a/kernel"], theta, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_square_of_a_product_is_that_of_the_matrix(lead):
    left, right, dense = (rng.normal(size=(*lead, *s)) for s in ((5, 3), (3, 4), (4, 5)))
    want = [np.sum((left @ right) ** 2), np.sum((left @ right + np.swapaxes(dense, -1, -2)) ** 2)]
    np.testing.assert_allclose([square_of_product(left, right), square_of_product(left, right, dense)], want, rtol=1e-5)


# adapters, over stages


def kernels(params: dict) -> dict[str, np.ndarray]:
    """What every adapted kernel is with all that adapters add, formed in numpy."""
    p, out = to_numpy(params), {}
    for site in (k.removesuffix("/lora_a") for k in p if k.endswith("/lora_a")):
        out[site] = p[site + "/kernel"] + p[site + "/lora_scale"] * (p[site + "/lora_b"] @ p[site + "/lora_a"]).T
        for a, b in zip(p.get(site + "/bank_a", ()), p.get(site + "/bank_b", ()), strict=True):
            out[site] = out[site] + p[site + "/bank_scale"] * (b @ a).T
    return out


ADAPTER = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
MAKERS = {
    "lora": lambda: lora(**ADAPTER),
    "merged": lambda: lora(merged=True, **ADAPTER),
    "olora": lambda: olora(max_stages=3, **ADAPTER),
}


@pytest.mark.parametrize("anchor", ["start", "previous"])
@pytest.mark.parametrize("name", MAKERS)
def test_adapters_are_held_by_what_they_add_to_their_kernels(name, anchor):
    method = l2_sp(strength=1.0, anchor=anchor)
    b = Between(experiment([method, MAKERS[name]()], n=3), lambda: None)
    first = None
    for stage in range(3):
        b.begin(stage)
        before = kernels(b.world.params)
        first = before if first is None else first
        term = terms(method, b.world.params, b.owns["l2_sp"])["given"]
        if anchor == "previous" or not stage:
            assert term == 0, "nothing has moved yet"
            slope = jax.grad(lambda p: terms(method, p, b.owns["l2_sp"])["given"])(dict(b.world.params))
            assert not any(np.any(slope[k]) for k in b.world.trained)
        moved = {k: b.world.params[k] + 0.3 * rng.normal(size=b.world.params[k].shape) for k in sorted(b.world.trained)}
        b.world = b.world._replace(params=b.world.params | {k: v.astype(jnp.float32) for k, v in moved.items()})
        centre, now = (first if anchor == "start" else before), kernels(b.world.params)
        want = 0.5 * sum(np.sum(np.square(now[s] - centre[s])) for s in now)
        np.testing.assert_allclose(terms(method, b.world.params, b.owns["l2_sp"])["given"], want, rtol=1e-4)
        b.end()


def test_the_gradient_of_factors_is_that_of_the_merged_kernel():
    """By finite differences in float64 of the matrix that numpy forms."""
    shapes = {"s/kernel": (4, 5), "s/lora_a": (2, 4), "s/lora_b": (5, 2)}
    p, anchor = draw(shapes) | {"s/lora_scale": jnp.float32(1.5)}, draw(shapes)
    slope = jax.grad(lambda b: distance(p | {"s/lora_b": b}, anchor))(p["s/lora_b"])
    whole = lambda p: p["s/kernel"] + 1.5 * (p["s/lora_b"] @ p["s/lora_a"]).T  # noqa: E731
    p64, a64 = ({k: np.asarray(v, np.float64) for k, v in t.items()} for t in (p, anchor))
    for index in ((0, 0), (4, 1)):
        up, down = (p64 | {"s/lora_b": p64["s/lora_b"].copy()} for _ in range(2))
        up["s/lora_b"][index] += 1e-5
        down["s/lora_b"][index] -= 1e-5
        ends = [0.5 * np.sum((whole(q) - whole(a64)) ** 2) for q in (up, down)]
        np.testing.assert_allclose(slope[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_anchors_are_what_was_given_and_no_step_overwrites_them(tmp_path):
    start = to_numpy(weights())
    done = run([l2_sp(strength=0.5)], tmp_path / "start", n=2)
    held = to_numpy(done.loop.now.owns["l2_sp"]["fixed"]["anchor"])
    assert same(held, {k: start[k] for k in held}) and held.keys() == {k for k in start if start[k].ndim > 1}
    seen = [r["l2_sp/given"] for r in done.log]
    assert seen[0] == 0 and all(x > 0 for x in seen[1:]), "also as the second stage begins"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"strength": -1.0}, "strength -1"),
        ({"beta": -0.1}, "beta -0.1"),
        ({"anchor": "prev"}, "did you mean 'previous'"),
        ({"form": "adam"}, "accepted: decoupled, loss"),
        ({"form": "decoupled"}, "rate is None"),
        ({"rate": 0.1}, "rate is 0.1 with form 'loss'"),
        ({"anneal": 250}, "anneal is 250"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        l2_sp(**arguments)
