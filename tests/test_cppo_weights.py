"""CPPO's sample weights: the worked numbers, the table of five kinds of samples, the bounds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import oracle

from jaxcl.losses.cppo import cppo_weights, high, low


def test_the_linear_weights_of_the_oracle_file():
    o = oracle("alignment")["cppo_linear"]
    for z, value in o["hi"].items():
        assert float(high(jnp.float32(z), o["k"], o["ub"])) == pytest.approx(value, abs=1e-6)
    for z, value in o["lo"].items():
        assert float(low(jnp.float32(z), o["k"], o["lb"])) == pytest.approx(value, abs=1e-6)


def test_five_kinds_of_samples():
    z = {  # of probability and reward: the two weights, k = 0.85, by hand
        (1.35, 4.0): (1.5, 2.5),  # both far up
        (1.35, -1.1): (1.5, 0.75),  # probable and poor
        (-1.35, 1.1): (1.5, 0.75),  # improbable and good
        (-1.1, -3.0): (0.75, 0.5),  # both far down
        (0.5, 4.0): (1.0, 1.0), (4.0, 0.5): (1.0, 1.0), (-4.0, 0.1): (1.0, 1.0), (0.0, 0.0): (1.0, 1.0),
    }  # fmt: skip
    found = cppo_weights(*(jnp.array(column, jnp.float32) for column in zip(*z)))
    np.testing.assert_allclose(np.stack(found, 1), list(z.values()), atol=1e-6)


def test_bounds_and_thresholds():
    rng = np.random.default_rng(0)
    p, r = (jnp.asarray(rng.normal(size=500) * 3, jnp.float32) for _ in range(2))
    both = np.stack(cppo_weights(p, r))
    assert both.min() >= 0.5 and both.max() <= 2.5 and len(np.unique(both)) > 100
    never = np.stack(cppo_weights(p, r, k=float("inf")))
    assert (never == 1).all()  # every sample is an ordinary one: plain PPO
    edge = np.stack(cppo_weights(jnp.array([0.85, 0.8501]), jnp.array([2.0, 0.8501])))
    np.testing.assert_allclose(edge, 1.0, atol=2e-4)
