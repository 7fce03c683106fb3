"""A bank folded into the kernels for a phase: the same function, the same model between phases, resumable, declared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, STACK, Answers, digest, experiment, relative, run, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.inclora import inclora
from jaxcl.methods.olora import olora
from jaxcl.models.stacking import restack
from jaxcl.surgery.adapters import fold_banks

rng = np.random.default_rng(0)
HOW = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "max_stages": 3, "targets": ("attn/*", "mlp/*")}


def banked(spec=MODEL.spec) -> tuple[Between, dict]:
    """A third stage's world with a full bank of random adapters, and a batch."""
    b = Between(experiment([olora(fold=True, **HOW)], n=3, rows=8, spec=spec), lambda: None)
    for stage in range(3):
        b.begin(stage)
        drawn = {k: 0.3 * rng.normal(size=v.shape) for k, v in b.world.params.items() if k.endswith("/lora_b")}
        params = {k: jnp.asarray(drawn.get(k, v), v.dtype) for k, v in b.world.params.items()}
        b.world = b.world._replace(params=params)
    return b, next(batches(Answers("s", 4), None, 4))


def test_kernels_take_the_sum_of_the_bank():
    b, _ = banked()
    before, after = to_numpy(b.world.params), to_numpy(fold_banks(b.world.params, b.owns["olora"]["host"]["sites"]))
    for site in b.owns["olora"]["host"]["sites"]:
        a, up, scale = (before[f"{site}/bank_{part}"] for part in ("a", "b", "scale"))
        added = scale * sum((up[s] @ a[s]).T for s in range(len(a)))
        assert np.abs(added).max() > 0.1
        np.testing.assert_allclose(after[site + "/kernel"], before[site + "/kernel"] + added, rtol=1e-4, atol=1e-5)
        assert site + "/bank_a" in after and not {site + "/bank_b", site + "/bank_scale"} & after.keys()


@pytest.mark.parametrize("stacked", [False, True])
def test_the_step_gets_the_same_function(stacked):
    b, batch = banked()
    spec, params = b.world.spec, b.world.params
    if stacked:
        params, spec = restack(params, spec, STACK)
        b.world = b.world._replace(params=params, spec=spec)
        b.placement = b._placement(spec, params)
        b.owns["olora"]["host"]["sites"] = sorted({k.removesuffix("/bank_a") for k in params if k.endswith("/bank_a")})
    fixed = b.fixed(params, batch)
    assert ("layers/0:2:1/attn/q/bank_b" in b.world.params) == stacked
    assert not [k for k in fixed.frozen if k.endswith("/bank_b")]
    got, want = (MODEL.apply(spec, p, batch).nll for p in (fixed.frozen, params))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    bare = {k: jnp.zeros_like(v) if k.endswith("bank_b") else v for k, v in params.items()}
    assert not np.allclose(got, MODEL.apply(spec, bare, batch).nll, atol=1e-2), "the bank was worth something"


def test_rows_that_weigh_the_bank_are_not_folded():
    b, batch = banked()
    weighed = {**batch, "bank_weight": np.ones((4, 2), np.float32)}
    assert b.fixed(b.world.params, weighed).frozen is b.world.params


def test_a_kernel_that_another_method_trains_keeps_its_bank_beside_it():
    b, batch = banked()
    site = "layers/1/mlp/down"
    trained = {f"{site}/kernel": b.world.params[f"{site}/kernel"]}
    frozen = b.fixed({k: v for k, v in b.world.params.items() if k not in trained}, batch).frozen
    assert [k for k in frozen if k.endswith("/bank_b")] == [site + "/bank_b"]
    want = MODEL.apply(b.world.spec, b.world.params, batch).nll
    np.testing.assert_allclose(MODEL.apply(b.world.spec, {**frozen, **trained}, batch).nll, want, rtol=2e-4, atol=2e-5)


def test_a_run_is_that_without_the_fold_and_leaves_the_base_alone(tmp_path):
    plain, folded = (run([olora(fold=f, **HOW)], tmp_path / str(f)) for f in (False, True))
    assert folded.compilations == plain.compilations == 1
    assert folded.params.keys() == plain.params.keys() and relative(folded.params, plain.params) < 2e-3
    np.testing.assert_allclose(folded.losses(), plain.losses(), rtol=1e-3)
    start = weights()
    assert digest({k: folded.params[k] for k in start}) == digest(to_numpy(start)), "kernels are what they were"
    assert olora(fold=True, **HOW).hparams["fold"] is True and inclora().hparams["fold"] is False


def test_what_cannot_be_folded_is_refused():
    for make in (olora, inclora):
        with pytest.raises(RequestError, match=r"fold with dropout 0\.1.*accepted: dropout 0"):
            make(fold=True)
    b, _ = banked()
    half = {k: v.astype(jnp.bfloat16) for k, v in b.world.params.items()}
    with pytest.raises(RequestError, match="bfloat16"):
        fold_banks(half, b.owns["olora"]["host"]["sites"])


def test_folding_is_not_differentiated():
    """The folded kernels are frozen arguments of the step: no product with the bank is left in it."""
    b, batch = banked()
    fixed = b.fixed({k: v for k, v in b.world.params.items() if not k.endswith(("lora_a", "lora_b"))}, batch)
    live = {k: v for k, v in b.world.params.items() if k.endswith(("lora_a", "lora_b"))}
    products = str(jax.make_jaxpr(lambda t: MODEL.apply(b.world.spec, {**fixed.frozen, **t}, batch).nll)(live))
    plain = {k: v for k, v in b.world.params.items() if "bank" not in k}
    assert products.count("dot_general") == str(
        jax.make_jaxpr(lambda t: MODEL.apply(b.world.spec, {**plain, **t}, batch).nll)(live)
    ).count("dot_general")
