"""EWC: the Fisher against closed forms, the penalty against numpy, the memory over stages."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment

from jaxcl.core.between import Between
from jaxcl.core.types import Outputs
from jaxcl.errors import RequestError
from jaxcl.losses.fisher import empirical, sampled
from jaxcl.losses.penalties import quadratic
from jaxcl.methods.ewc import accumulate, ewc, shaped
from jaxcl.methods.lora import lora
from jaxcl.methods.olora import olora

rng = np.random.default_rng(0)


class Linear:
    """y ~ N(x w, sigma^2) as a stand-in for a model's forward."""

    def __init__(self, sigma: float):
        self.sigma = sigma

    def __call__(self, train, batch):
        residual = batch["y"] - batch["x"] @ train["w"]
        return Outputs(nll=residual**2 / (2 * self.sigma**2) + jnp.log(self.sigma))


class Logistic:
    """Token 1 with probability sigmoid(x w), else token 0."""

    def __call__(self, train, batch):
        return Outputs(hidden=batch["x"])

    def logits(self, train, out, at):
        z = out.hidden @ train["w"]
        return jnp.stack([jnp.zeros_like(z), z], -1)[:, None]


def test_fisher_of_a_linear_gaussian_is_its_closed_form():
    """F = X^T X / sigma^2 on the diagonal, with residuals of exactly one sigma."""
    x, w, sigma = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32), 0.5
    y = x @ w + sigma * rng.choice([-1, 1], 40).astype(np.float32)

    def one(x, y):
        row = {"x": x[None], "y": y[None], "weight": jnp.ones((1,))}
        return empirical(Linear(sigma), {"w": jnp.array(w)}, row, jax.random.key(0))["w"]

    found = jax.vmap(one)(x, y).mean(0)
    np.testing.assert_allclose(found, np.diag(x.T @ x) / sigma**2 / 40, rtol=1e-4)


def test_sampled_fisher_of_logistic_regression_is_its_closed_form():
    """F = E[p (1 - p) x^2], whatever the gold answers are; 20000 draws a row."""
    x, w = rng.normal(size=(6, 3)).astype(np.float32), np.array([0.5, -1.0, 2.0], np.float32)
    p = 1 / (1 + np.exp(-x @ w))

    def one(x, key):
        row = {"x": x[None], "tokens": jnp.zeros((1, 1), int), "weight": jnp.ones((1, 1))}
        row["targets_at"] = jnp.ones((1, 1), int)
        return sampled(Logistic(), {"w": jnp.array(w)}, row, key)["w"]

    keys = jax.random.split(jax.random.key(1), 20_000)
    found = jax.vmap(lambda x: jax.vmap(lambda k: one(x, k))(keys).mean(0))(x)
    np.testing.assert_allclose(found, (p * (1 - p))[:, None] * x**2, rtol=0.05)


@pytest.fixture(scope="module")
def by_tools():
    """Fisher of ten rows by the tools (batches of eight), frozen leaves left out."""
    b = Between(experiment([lora(rank=2, dropout=0.5)], n=1, rows=10), lambda: None)
    b.begin(0)
    drawn = {k: rng.normal(size=b.world.params[k].shape).astype(np.float32) for k in sorted(b.world.trained)}
    b.world = b.world._replace(params=b.world.params | drawn)
    world = b.given(0, 0)
    return b.world, world.tools.mean(empirical, None, world.key)


def test_fisher_is_the_mean_of_per_example_squares(by_tools):
    world, found = by_tools
    train = {k: v for k, v in world.params.items() if k in world.trained}
    source = Answers("s0", 10, seed=0)

    @jax.jit
    def gradient(row):
        def nll(train):
            batch = jax.tree.map(lambda x: x[None], row)
            return jnp.sum(row["weight"] * MODEL.apply(SPEC, world.params | train, batch).nll[0])

        return jax.grad(nll)(train)

    grads = [gradient(source[i]) for i in range(10)]
    for k in train:
        each = np.stack([g[k] for g in grads])
        np.testing.assert_allclose(found[k], (each**2).mean(0), rtol=1e-3, atol=1e-6)
        assert not np.allclose(found[k], each.mean(0) ** 2, rtol=0.1), "the square of the mean is another thing"


def test_batches_of_one_row_give_the_same_fisher(by_tools):
    world, found = by_tools
    b = Between(experiment([lora(rank=2, dropout=0.5)], n=1, rows=10, batch_size=1), lambda: None)
    b.begin(0)
    b.world = b.world._replace(params=world.params)
    one = b.given(0, 0).tools.mean(empirical, None, world.key)
    for k in found:
        np.testing.assert_allclose(one[k], found[k], rtol=1e-3, atol=1e-6)


def test_fisher_is_not_negative_and_knows_no_frozen_leaf(by_tools):
    world, found = by_tools
    assert found.keys() == world.trained and all(k.endswith(("lora_a", "lora_b")) for k in found)
    assert all(np.min(f) >= 0 and np.max(f) > 0 and f.dtype == jnp.float32 for f in found.values())


def test_quadratic_against_numpy_and_zero_at_the_anchor():
    p, a = ({k: rng.normal(size=s).astype(np.float32) for k, s in (("x", (3, 4)), ("y", (5,)))} for _ in range(2))
    f = {k: rng.uniform(size=v.shape).astype(np.float32) for k, v in p.items()}
    want = 0.5 * sum(np.sum(f[k] * (p[k] - a[k]) ** 2) for k in p)
    np.testing.assert_allclose(quadratic(p, a, f), want, rtol=1e-6)
    gradient = jax.grad(quadratic)(p, a, f)
    for k in p:
        np.testing.assert_allclose(gradient[k], f[k] * (p[k] - a[k]), rtol=1e-5)
    assert quadratic(a, a, f) == 0 and all(not g.any() for g in jax.grad(quadratic)(a, a, f).values())
    stacked = {k: np.stack([v, 2 * v]) for k, v in f.items()}, {k: np.stack([v, v + 1]) for k, v in a.items()}
    both = want + 0.5 * sum(np.sum(2 * f[k] * (p[k] - a[k] - 1) ** 2) for k in p)
    np.testing.assert_allclose(quadratic(p, stacked[1], stacked[0]), both, rtol=1e-6)
    assert quadratic({"x": p["x"]}, a, {"y": f["y"]}) == 0, "keys without a parameter cost nothing"


def test_on_quadratic_tasks_ewc_ends_where_joint_training_does():
    """Task 1 is 1/2 (x - a)^T D1 (x - a), so D1 is its Fisher at a; the joint optimum is in closed form."""
    d1, d2 = rng.uniform(0.5, 2, 6).astype(np.float32), rng.uniform(0.5, 2, 6).astype(np.float32)
    a, b = rng.normal(size=6).astype(np.float32), rng.normal(size=6).astype(np.float32)

    def second(x):
        return 0.5 * jnp.sum(d2 * (x["x"] - b) ** 2) + quadratic(x, {"x": a}, {"x": d1})

    x, gradient = {"x": jnp.array(a)}, jax.jit(jax.grad(second))
    for _ in range(200):
        x = jax.tree.map(lambda v, g: v - 0.25 * g, x, gradient(x))
    np.testing.assert_allclose(x["x"], (d1 * a + d2 * b) / (d1 + d2), rtol=1e-5, atol=1e-6)


# the memory over stages, with Fishers given instead of measured


def after(stages: int, values, **arguments):
    """EWC's memory after so many stages whose Fishers and weights are given."""
    method = ewc(rows=None, **arguments)
    shape = {"w": jnp.zeros(3)}
    world = SimpleNamespace(params=shape, trained=frozenset(shape), key=None, stage=0)
    own = method.init(world)
    for t in range(stages):
        tools = SimpleNamespace(mean=lambda fn, rows, key, t=t: {"w": values[t]})
        world = SimpleNamespace(params={"w": jnp.full(3, 10.0 + t)}, key=None, tools=tools, stage=t)
        _, own = method.begin(world, own) if method.begin else (world, own)
        _, own = method.end(world, own)
    return own["fixed"]


F = np.array([[1.0, 2, 3], [10, 0, 5], [7, 7, 100]], np.float32)


@pytest.mark.parametrize(
    "arguments,want",
    [
        ({"gamma": 1.0}, F.sum(0)),
        ({"gamma": 0.0}, F[2]),
        ({"gamma": 0.5}, F[2] + 0.5 * F[1] + 0.25 * F[0]),
        ({"mode": "mean"}, F.mean(0)),
        ({"gamma": 0.0, "clip": 10.0}, np.minimum(F[2], 10)),
        ({"gamma": 0.0, "normalize": True}, F[2] / F[2].mean()),
    ],
)
def test_fishers_of_stages_are_put_together_as_the_mode_says(arguments, want):
    fixed = after(3, F, **arguments)
    np.testing.assert_allclose(fixed["fisher"]["w"], want, rtol=1e-6)
    np.testing.assert_array_equal(fixed["anchor"]["w"], np.full(3, 12.0))


def test_separate_keeps_every_stage_but_the_last_and_refuses_one_too_many():
    fixed = after(3, F, mode="separate", max_stages=3)
    np.testing.assert_array_equal(fixed["fisher"]["w"], F[:2])
    np.testing.assert_array_equal(fixed["anchor"]["w"][:, 0], [10, 11])
    with pytest.raises(RequestError, match="stage 4 exceeds max_stages=3"):
        after(4, [*F, F[0]], mode="separate", max_stages=3)


def test_normalizing_is_per_layer_in_a_stack():
    f = rng.uniform(size=(2, 3, 4)).astype(np.float32) * np.array([1, 50])[:, None, None]
    fixed = {}
    for key in ("layers/0:2:1/mlp/up/kernel", "mlp/kernel"):
        tools = SimpleNamespace(mean=lambda *_, key=key: {key: jnp.array(f)})
        world = SimpleNamespace(params={key: jnp.zeros((2, 3, 4))}, trained={key}, key=None, tools=tools, stage=0)
        method = ewc(normalize=True)
        fixed[key] = np.asarray(method.end(world, method.init(world))[1]["fixed"]["fisher"][key])
    np.testing.assert_allclose(fixed["layers/0:2:1/mlp/up/kernel"].mean((1, 2)), [1, 1], rtol=1e-5)
    np.testing.assert_allclose(fixed["mlp/kernel"], f / f.mean(), rtol=1e-5)
    assert np.all(np.asarray(shaped(jnp.zeros(3), True, None)) == 0), "a Fisher of zeros stays so"
    assert np.allclose(accumulate(np.ones(2), np.full(2, 4.0), "mean", 1.0, 2), 2.0)


ADAPTER = {"rank": 2, "alpha": 4.0, "dropout": 0.0}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: lora(merged=True, **ADAPTER), lambda: olora(max_stages=3, **ADAPTER)], ids=["merged", "olora"]
)
def test_a_fresh_adapter_is_anchored_where_it_starts(make, first):
    """What moved into the base or the bank must not pull the new adapter: the penalty starts at zero."""
    b = Between(experiment([ewc(rows=8), make()] if first else [make(), ewc(rows=8)], n=2), lambda: None)
    b.begin(0)
    fill = functools.partial(np.full, dtype=np.float32)
    b.world = b.world._replace(params=b.world.params | {k: fill(b.world.params[k].shape, 0.3) for k in b.world.trained})
    b.end()
    b.begin(1)
    fixed = b.owns["ewc"]["fixed"]
    assert fixed["fisher"].keys() == b.world.trained
    assert quadratic(b.world.params, fixed["anchor"], fixed["fisher"]) == 0
    ones = {k: np.ones(v.shape) for k, v in fixed["fisher"].items()}
    assert quadratic(b.world.params, fixed["anchor"], ones) == 0


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"strength": -1.0}, "strength is -1"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"mode": "onlin"}, "did you mean 'online'"),
        ({"fisher": "true"}, "empirical, sampled"),
        ({"rows": 0}, "rows is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        ewc(**arguments)
