"""Learning rates on the clock against their formulas in numpy, and in a run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import run, same

from jaxcl.core.types import Clock
from jaxcl.errors import RequestError
from jaxcl.transforms.infinite import infinite, infinite_rate
from jaxcl.transforms.rewarm import rewarm, rewarm_rate


def cosine(s: float, w: float, total: float, peak: float, floor: float) -> float:
    return floor + (peak - floor) / 2 * (1 + np.cos(np.pi * (s - w) / (total - w)))


@pytest.mark.parametrize("s", [0, 1, 9, 10, 11, 55, 99, 100])
def test_rewarm_against_its_formula(s):
    expected = 3e-4 * s / 10 if s <= 10 else cosine(s, 10, 100, 3e-4, 3e-5)
    assert float(rewarm_rate(s, 100, 3e-4, 3e-5, 10)) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert float(rewarm_rate(s, 100, 3e-4, 3e-5, 0.1)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_rewarm_at_its_ends():
    assert float(rewarm_rate(10, 100, 1.0, 0.1, 10)) == pytest.approx(1.0)
    assert float(rewarm_rate(100, 100, 1.0, 0.1, 10)) == pytest.approx(0.1)
    assert float(rewarm_rate(0, 100, 1.0, 0.1, 0)) == pytest.approx(1.0), "no warm-up is legal"
    assert float(rewarm_rate(0, 100, 1.0, 0.1, 10, start=0.1)) == pytest.approx(0.1)
    rates = [float(rewarm_rate(s, 50, 0.2, 0.2, 0)) for s in range(51)]
    assert rates == pytest.approx([0.2] * 51), "a floor at the peak is a constant rate"


def test_infinite_against_its_formula():
    args = {"peak": 3e-4, "constant": 1.5e-4, "floor": 3e-5, "warmup": 10, "cooldown": 60, "anneal": (200, 250)}
    rate = lambda s: float(infinite_rate(s, **args))  # noqa: E731
    assert rate(5) == pytest.approx(1.5e-4) and rate(10) == pytest.approx(3e-4)
    assert rate(40) == pytest.approx(cosine(40, 10, 70, 3e-4, 1.5e-4), rel=1e-5)
    assert {rate(s) for s in range(70, 200)} == {float(np.float32(1.5e-4))}, "constant to the bit"
    assert rate(200) == pytest.approx(1.5e-4) and rate(250) == pytest.approx(3e-5, rel=1e-5)
    assert rate(225) == pytest.approx(1.5e-4 * (3e-5 / 1.5e-4) ** 0.5, rel=1e-5)
    trunk = [float(infinite_rate(s, **{**args, "anneal": None})) for s in range(300)]
    assert trunk[:200] == [rate(s) for s in range(200)], "the trunk does not know of the branch"


def test_updates_are_scaled_by_minus_the_rate():
    tx, grads = rewarm(peak=0.5, floor=0.5), {"w": jnp.array([2.0, -4.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads, clock=Clock.at(phase_step=3, phase_len=10))
    np.testing.assert_allclose(updates["w"], [-1.0, 2.0])


def test_a_loop_without_a_clock_is_told_so():
    with pytest.raises(RequestError, match="clock="):
        rewarm().update({"w": jnp.zeros(1)}, optax.EmptyState())


def test_every_stage_warms_up_again_and_the_infinite_schedule_does_not(tmp_path):
    """Plain descent: a first step at rate 0 moves nothing, so the loss of two equal batches would be equal."""
    again = run([], tmp_path / "again", n=2, tx=rewarm(peak=0.1, warmup=1.0))
    constant = run([], tmp_path / "constant", n=2, tx=optax.sgd(0.1))
    trunk = run([], tmp_path / "trunk", n=2, tx=infinite(0.1, 0.1, 0.1, warmup=0, cooldown=0), reset_opt=False)
    assert again.compilations == trunk.compilations == 1
    np.testing.assert_allclose(trunk.losses(), constant.losses(), rtol=1e-6)
    assert not same(again.params, constant.params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rewarm(peak=-1.0),
        lambda: rewarm(peak=1e-4, floor=2e-4),
        lambda: rewarm(warmup=-1),
        lambda: infinite(constant=1.0),
        lambda: infinite(floor=0.0),
        lambda: infinite(anneal=(50, 60)),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(RequestError, match="accepted"):
        make()
