"""The losses of alignment against the oracle file, which test_policy has written out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import oracle

from jaxcl.losses import policy


def test_preference_losses():
    o = oracle("alignment")
    rm, dpo, k3 = o["rm"], o["dpo"], o["k3_kl"]
    found = float(policy.preference(jnp.float32(rm["r_w"]), jnp.float32(rm["r_l"])))
    assert found == pytest.approx(rm["loss"], abs=1e-6)
    logps = (jnp.float32(dpo[k]) for k in ("logp_w", "logp_l", "ref_w", "ref_l"))
    loss, margin = policy.dpo(*logps, beta=dpo["beta"])
    assert (float(loss), float(margin)) == pytest.approx((dpo["loss"], dpo["reward_margin"]), abs=1e-6)
    found = float(policy.k3(jnp.float32(k3["logp"]), jnp.float32(k3["logp_ref"])))
    assert found == pytest.approx(k3["value"], abs=1e-6)


def test_advantages():
    o = oracle("alignment")
    rewards = jnp.array(o["grpo"]["rewards"], jnp.float32)
    for scale in ("population", "sample"):
        found = policy.group_advantages(rewards, scale, eps=0.0)
        np.testing.assert_allclose(found, o["grpo"][f"adv_{scale}_std"], atol=1e-6)
    g = o["gae"]
    rows = (jnp.array([g[k]], jnp.float32) for k in ("rewards", "values"))
    advantages, _ = policy.gae(*rows, jnp.ones((1, 3)), gamma=g["gamma"], lam=g["lam"])
    np.testing.assert_allclose(advantages[0], g["advantages"], atol=1e-6)
