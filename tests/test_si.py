"""SI's path integral and penalty against closed forms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import run, same, to_numpy

from jaxcl.core.types import Clock, Ctx
from jaxcl.errors import RequestError
from jaxcl.methods.si import si


def context(own: dict, params: dict) -> Ctx:
    return Ctx(params, own, {}, jnp.ones(1), None, Clock.at(), None, None)  # type: ignore[arg-type]


def descend(lr: float, steps: int, strength: float = 0.1) -> tuple[dict, np.ndarray, float]:
    """(own, end, loss decrease) of plain descent on 1/2 theta^T H theta through si's own observe."""
    method, hessian = si(strength=strength), np.diag([1.0, 3.0, 0.0]).astype(np.float32)
    theta = jnp.asarray([1.0, -2.0, 5.0])
    own = {"fixed": {"omega": {"w": jnp.zeros(3)}, "anchor": {"w": theta}}, "live": {"path": {"w": jnp.zeros(3)}}}
    energy = lambda x: 0.5 * float(x @ hessian @ x)  # noqa: E731
    before = energy(np.asarray(theta))
    for _ in range(steps):
        grads = {"w": jnp.asarray(hessian) @ theta}
        updates = {"w": -lr * grads["w"]}
        own["live"] = method.observe(context(own, {"w": theta}), grads, updates, {"w": theta})
        theta = theta + updates["w"]
    return own, np.asarray(theta), before - energy(np.asarray(theta))


def test_the_path_integral_is_the_loss_decrease():
    own, _, decrease = descend(1e-3, 800)
    total = float(jnp.sum(own["live"]["path"]["w"]))
    assert abs(total - decrease) < 2e-3 * decrease + 1e-3
    assert float(own["live"]["path"]["w"][2]) == 0.0, "no gradient, no importance"


def test_the_taken_step_counts_not_the_gradient():
    one, two = (descend(lr, 1)[0]["live"]["path"]["w"] for lr in (1e-3, 2e-3))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_the_own_penalty_is_taken_out_of_the_gradient():
    method, c = si(strength=0.5), 0.5
    omega, anchor, theta = jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0])
    own = {"fixed": {"omega": {"w": omega}, "anchor": {"w": anchor}}, "live": {"path": {"w": jnp.zeros(1)}}}
    penalized = 0.7 + 2 * c * omega * (theta - anchor)
    got = method.observe(context(own, {"w": theta}), {"w": penalized}, {"w": jnp.array([-0.1])}, {"w": theta})
    np.testing.assert_allclose(got["path"]["w"], [0.07], rtol=1e-5)


def test_the_penalty_has_no_factor_one_half():
    own = {"fixed": {"omega": {"w": jnp.array([2.0, 4.0])}, "anchor": {"w": jnp.zeros(2)}}, "live": {"path": {}}}
    term = si(strength=0.25).loss(context(own, {"w": jnp.array([1.0, 3.0])}))["penalty"]
    assert float(term) == pytest.approx(0.25 * (2 * 1 + 4 * 9))


def test_consolidation_in_a_run(tmp_path):
    """Omega from what the run itself logged of start and end; nothing in the first stage, then a penalty."""
    tx = optax.sgd(0.1)
    done = run([si(strength=1.0, xi=1e-3)], tmp_path / "si", n=2, tx=tx)
    plain = run([], tmp_path / "plain", n=2, tx=tx)
    assert {r["si/penalty"] for r in done.log if r["stage"] == 0} == {0.0}
    np.testing.assert_allclose(done.losses(0), plain.losses(0), rtol=1e-6)
    assert done.log[-1]["si/penalty"] > 0 and not same(done.params, plain.params)
    own = to_numpy(done.loop.now.owns["si"])
    assert all((o >= 0).all() for o in own["fixed"]["omega"].values())
    assert not any(w.any() for w in own["live"]["path"].values()), "the path starts anew"
    for key, value in done.params.items():
        np.testing.assert_array_equal(own["fixed"]["anchor"][key], value)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"xi": 0.0}])
def test_bad_values_are_refused(bad):
    with pytest.raises(RequestError):
        si(**bad)
