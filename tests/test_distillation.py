"""Distillation against closed forms, and LwF's teacher in a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import run, to_numpy

from jaxcl.errors import RequestError
from jaxcl.losses.distillation import kl, kl_top, masked_mean
from jaxcl.methods.lwf import lwf
from jaxcl.methods.replay import replay

RNG = np.random.default_rng(0)
OLD, NEW = RNG.normal(size=(5, 11)).astype(np.float32), RNG.normal(size=(5, 11)).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("t", [1.0, 2.0, 5.0])
def test_kl_is_forward_and_scaled_by_t_squared(t):
    q, p = softmax(OLD.astype(np.float64) / t), softmax(NEW.astype(np.float64) / t)
    np.testing.assert_allclose(kl(OLD, NEW, t), t**2 * (q * np.log(q / p)).sum(-1), rtol=2e-5)
    assert (np.asarray(kl(OLD, NEW, t)) >= 0).all()


def test_equal_student_has_no_loss_and_no_gradient():
    value, slope = jax.value_and_grad(lambda z: jnp.sum(kl(OLD, z)))(jnp.asarray(OLD))
    assert abs(float(value)) < 1e-5 and float(jnp.abs(slope).max()) < 1e-6


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_gradient_is_t_times_p_minus_q(t):
    slope = jax.grad(lambda z: jnp.sum(kl(OLD, z, t)))(jnp.asarray(NEW))
    np.testing.assert_allclose(slope, t * (softmax(NEW / t) - softmax(OLD / t)), atol=1e-5)


def test_at_a_high_temperature_the_gradient_is_the_centred_difference_over_v():
    slope = jax.grad(lambda z: jnp.sum(kl(OLD, z, 1000.0)))(jnp.asarray(NEW))
    difference = (NEW - NEW.mean(-1, keepdims=True)) - (OLD - OLD.mean(-1, keepdims=True))
    np.testing.assert_allclose(slope, difference / NEW.shape[-1], atol=1e-3)


def test_no_gradient_reaches_the_teacher():
    assert not np.any(jax.grad(lambda z: jnp.sum(kl(z, NEW)))(jnp.asarray(OLD)))


def test_all_v_largest_logits_are_the_whole_teacher():
    value, index = jax.lax.top_k(jnp.asarray(OLD), OLD.shape[-1])
    np.testing.assert_allclose(kl_top(index, value, NEW), kl(OLD, NEW), rtol=1e-5)


def test_masked_mean_ignores_the_rest_even_nan():
    values, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
    assert float(masked_mean(values, mask)) == 2.0
    assert float(masked_mean(values, jnp.zeros(3, bool))) == 0.0


def test_the_teacher_is_the_model_at_the_end_of_the_stage_before(tmp_path):
    """Nothing is distilled in the first stage; the teacher kept after two stages is what one stage less left."""
    two = run([lwf()], tmp_path / "two", n=2)
    one = run([lwf()], tmp_path / "one", n=1)
    assert {r["lwf/distillation"] for r in two.log if r["stage"] == 0} == {0.0}
    first = [r["lwf/distillation"] for r in two.log if r["stage"] == 1]
    assert abs(first[0]) < 1e-6 < first[-1], "equal at the start of the stage, apart after a step"
    teacher = to_numpy(one.loop.now.owns["lwf"]["fixed"]["teacher"])
    for key, value in one.params.items():
        np.testing.assert_array_equal(teacher[key], value)


def test_cached_logits_of_all_tokens_teach_as_the_snapshot_does(tmp_path):
    """k = V: one precomputed forward per row against one a step."""
    live = run([lwf(rows="new")], tmp_path / "live", n=2)
    cached = run([lwf(rows="new", teacher="topk", k=32)], tmp_path / "cached", n=2)
    np.testing.assert_allclose(cached.losses(), live.losses(), rtol=1e-5)


def test_rows_say_who_is_taught(tmp_path):
    """Without replay there are no old rows; with it, old and new rows together make up all."""
    none = run([lwf(rows="old")], tmp_path / "none", n=2)
    assert {r["lwf/distillation"] for r in none.log} == {0.0}
    some = run([lwf(rows="old"), replay(ratio=1.0)], tmp_path / "some", n=2)
    assert some.log[-1]["lwf/distillation"] > 0


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"strength": -1}, "-1"),
        ({"temperature": 0}, "temperature 0"),
        ({"teacher": "topp"}, "topk"),
        ({"rows": "odd"}, "old"),
        ({"teacher": "topk", "rows": "old"}, "snapshot"),
        ({"k": 0}, "k 0"),
    ],
)
def test_bad_values_are_refused(bad, named):
    with pytest.raises(RequestError, match=named):
        lwf(**bad)
