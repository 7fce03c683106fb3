"""A-GEM's and GEM's projections against their definitions and a dense solver."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from support import run, same

from jaxcl.errors import RequestError
from jaxcl.methods.agem import agem
from jaxcl.methods.gem import gem
from jaxcl.transforms.projections import agem as project_one
from jaxcl.transforms.projections import dot, nonnegative_qp
from jaxcl.transforms.projections import gem as project_all


def tree(seed: int, scale: float = 1.0) -> dict:
    return unflat(scale * np.random.default_rng(seed).normal(size=17))


def unflat(x: np.ndarray) -> dict:
    return {"a": jnp.asarray(x[:12].reshape(3, 4), jnp.float32), "b": jnp.asarray(x[12:], jnp.float32)}


def flat(t: dict) -> np.ndarray:
    return np.concatenate([np.ravel(t[k]).astype(np.float64) for k in sorted(t)])


PAIRS = [(tree(2 * s), tree(2 * s + 1)) for s in range(20)]


@pytest.mark.parametrize("g, r", PAIRS)
def test_agem_against_its_formula(g, r):
    a, b = flat(g), flat(r)
    expected = a if a @ b >= 0 else a - (a @ b) / (b @ b) * b
    got = project_one(g, r)
    np.testing.assert_allclose(flat(got), expected, atol=1e-5)
    assert flat(got) @ b >= -1e-4 and np.linalg.norm(flat(got)) <= np.linalg.norm(a) + 1e-6
    if a @ b >= 0:
        assert same({k: np.asarray(v) for k, v in got.items()}, {k: np.asarray(v) for k, v in g.items()})


def test_an_empty_memory_changes_nothing_and_makes_no_nan():
    g = tree(0)
    zero = {k: jnp.zeros_like(v) for k, v in g.items()}
    for got in (project_one(g, zero), project_all(g, [zero, zero])):
        np.testing.assert_array_equal(flat(got), flat(g))


def test_agem_scales_as_it_should():
    g, r = next((g, r) for g, r in PAIRS if float(dot(g, r)) < 0)
    scaled = {k: 7.0 * v for k, v in r.items()}
    np.testing.assert_allclose(flat(project_one(g, scaled)), flat(project_one(g, r)), atol=1e-5)
    double = {k: 2.0 * v for k, v in g.items()}
    np.testing.assert_allclose(flat(project_one(double, r)), 2 * flat(project_one(g, r)), atol=1e-5)


def closest(g: np.ndarray, refs: np.ndarray) -> np.ndarray:
    """argmin ||x - g|| with refs x >= 0: the polar cone's part comes from non-negative least squares."""
    v, _ = nnls(refs.T, -g)
    return g + refs.T @ v


@pytest.mark.parametrize("seed", range(8))
def test_gem_with_no_margin_is_the_closest_feasible_gradient(seed):
    g, refs = tree(100 + seed), [tree(200 + 10 * seed + i) for i in range(3)]
    got = flat(project_all(g, refs, margin=0.0, eps=0.0, sweeps=2000))
    rows = np.stack([flat(r) for r in refs])
    np.testing.assert_allclose(got, closest(flat(g), rows), atol=2e-3)
    assert (rows @ got >= -1e-2).all()
    again = project_all(unflat(got), refs, 0.0, 0.0, 2000)
    np.testing.assert_allclose(flat(again), got, atol=2e-3)  # idempotent
    shuffled = project_all(g, refs[::-1], margin=0.0, eps=0.0, sweeps=2000)
    np.testing.assert_allclose(flat(shuffled), got, atol=2e-3)


def test_scaling_a_memorys_gradient_leaves_the_constraint_as_it_is():
    g, refs = tree(1), [tree(60), tree(61)]
    scaled = [refs[0], {k: 5.0 * v for k, v in refs[1].items()}]
    one, other = (flat(project_all(g, r, margin=0.0, eps=0.0, sweeps=2000)) for r in (refs, scaled))
    np.testing.assert_allclose(one, other, atol=2e-3)
    assert not np.allclose(one, flat(g)), "it does bind"


def test_one_constraint_is_agem():
    for g, r in PAIRS[:6]:
        np.testing.assert_allclose(flat(project_all(g, [r], margin=0.0, eps=0.0)), flat(project_one(g, r)), atol=1e-4)


def test_without_a_violation_gem_returns_the_gradient_bit_for_bit():
    g = tree(0)
    got = project_all(g, [{k: 0.5 * v for k, v in g.items()}])
    np.testing.assert_array_equal(flat(got), flat(g))


def test_the_margin_bounds_the_dual_variables():
    k, b = jnp.array([[2.0, 0.3], [0.3, 1.0]]), jnp.array([5.0, -3.0])
    np.testing.assert_allclose(nonnegative_qp(k, b, jnp.array([0.5, 0.5]), 50), [0.5, 2.85], atol=1e-5)


def test_constraints_hold_from_the_second_stage_on(tmp_path):
    lists = {"plain": [], "agem": [agem(capacity=8)], "gem": [gem(capacity=8)]}
    plain, one, many = (run(methods, tmp_path / name, n=2) for name, methods in lists.items())
    for done in (one, many):
        assert np.array_equal(done.losses(0), plain.losses(0)), "no memory, no change"
        assert done.compilations == 1
        assert not same(done.params, plain.params)
    # one old stage: both project on the gradient of the same number of its rows
    assert same(run([agem(capacity=0)], tmp_path / "none", n=2).params, plain.params)


@pytest.mark.parametrize("make", [lambda: agem(capacity=-1), lambda: gem(margin=-0.1), lambda: gem(policy="ringg")])
def test_bad_values_are_refused(make):
    with pytest.raises(RequestError):
        make()


def test_more_stages_than_gem_was_made_for_are_refused(tmp_path):
    with pytest.raises(RequestError, match="max_stages=2"):
        run([gem(capacity=8, max_stages=2)], tmp_path / "run", n=3)
