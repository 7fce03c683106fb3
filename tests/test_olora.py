"""O-LoRA's penalties against numpy, and what they may touch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import experiment, run, to_numpy

from jaxcl.core.between import Between
from jaxcl.core.types import Ctx
from jaxcl.errors import RequestError
from jaxcl.losses.penalties import frobenius, orthogonality
from jaxcl.methods.inclora import inclora
from jaxcl.methods.olora import olora

rng = np.random.default_rng(0)
A, BANK = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(3, 2, 8)).astype(np.float32)
OLD = BANK.reshape(6, 8)  # the concatenation [A_1; A_2; A_3]


def test_both_norms_against_numpy():
    np.testing.assert_allclose(orthogonality(A, BANK, "l1"), np.abs(OLD @ A.T).sum(), rtol=1e-6)
    np.testing.assert_allclose(orthogonality(A, BANK, "l2sq"), ((OLD @ A.T) ** 2).sum(), rtol=1e-5)
    empty = np.concatenate([BANK, np.zeros((4, 2, 8), np.float32)])
    assert orthogonality(A, empty, "l1") == pytest.approx(float(orthogonality(A, BANK, "l1")), rel=1e-6)


def test_gradients_in_closed_form():
    """sign(A_old A^T)^T A_old, and 2 (A_old A^T)^T A_old."""
    overlap = OLD @ A.T
    np.testing.assert_allclose(jax.grad(orthogonality)(A, BANK, "l1"), np.sign(overlap).T @ OLD, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(orthogonality)(A, BANK, "l2sq"), 2 * overlap.T @ OLD, rtol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2sq"])
def test_zero_if_and_only_if_orthogonal(norm):
    basis = np.eye(8, dtype=np.float32)
    assert orthogonality(basis[:2], basis[2:].reshape(3, 2, 8), norm) == 0
    assert orthogonality(basis[:2], np.zeros((3, 2, 8)), norm) == 0
    assert orthogonality(basis[:2] + 0.01 * basis[7], basis[2:].reshape(3, 2, 8), norm) > 0


def test_orthogonal_adapters_do_not_see_old_inputs():
    """If A_old A^T = 0 and x lies in the row space of A_old, then B A x = 0."""
    q = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    old, new = q[:4], q[4:6]
    x = rng.normal(size=4).astype(np.float32) @ old
    assert orthogonality(new, old[None], "l1") < 1e-5
    np.testing.assert_allclose(rng.normal(size=(5, 2)) @ (new @ x), 0, atol=1e-5)


def test_a_stack_is_the_sum_of_its_layers():
    a, bank = rng.normal(size=(4, 2, 8)), rng.normal(size=(4, 3, 2, 8))
    for norm in ("l1", "l2sq"):
        layers = sum(float(orthogonality(a[i], bank[i], norm)) for i in range(4))
        np.testing.assert_allclose(orthogonality(a, bank, norm), layers, rtol=1e-5)
    np.testing.assert_allclose(frobenius(a), sum(np.linalg.norm(x) for x in a), rtol=1e-5)


def test_frobenius_norm_has_gradient_zero_at_zero():
    np.testing.assert_allclose(frobenius(A), np.linalg.norm(A), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(frobenius)(A), A / np.linalg.norm(A), rtol=1e-5)
    assert not np.asarray(jax.grad(frobenius)(jnp.zeros((2, 8)))).any()


SMALL = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "max_stages": 3}


def second_stage(*methods) -> Between:
    """The world of stage 1, its adapters and first bank slot random."""
    b = Between(experiment(list(methods), n=2), lambda: None)
    b.begin(0)
    live = {k: jnp.asarray(rng.normal(size=b.world.params[k].shape), jnp.float32) for k in sorted(b.world.trained)}
    b.world = b.world._replace(params=b.world.params | live)
    b.end()
    b.begin(1)
    return b


def terms(method, params: dict) -> dict:
    return method.loss(Ctx(params, None, {}, None, None, None, None, None))


def test_the_loss_is_the_papers_and_the_codes():
    for norm in ("l1", "l2sq"):
        method = olora(strength=0.5, norm_strength=0.1, norm=norm, **SMALL)
        b = second_stage(method)
        p, found = to_numpy(b.world.params), terms(method, b.world.params)
        where = [k.removesuffix("/lora_a") for k in p if k.endswith("/lora_a")]
        assert len(where) == 4
        overlaps = [p[s + "/bank_a"].reshape(-1, 16) @ p[s + "/lora_a"].T for s in where]
        size = (lambda o: np.abs(o).sum()) if norm == "l1" else (lambda o: (o**2).sum())
        np.testing.assert_allclose(found["orthogonality"], 0.5 * sum(map(size, overlaps)), rtol=1e-5)
        norms = sum(np.linalg.norm(p[f"{s}/lora_{x}"]) for s in where for x in "ab")
        np.testing.assert_allclose(found["norm"], 0.1 * norms, rtol=1e-5)


def test_orthogonality_is_felt_by_the_new_a_alone():
    method = olora(strength=0.5, **SMALL)
    b = second_stage(method)
    train = {k: b.world.params[k] for k in b.world.trained}
    assert all(k.endswith(("/lora_a", "/lora_b")) for k in train), "the bank is not trained"
    grads = jax.grad(lambda t: terms(method, b.world.params | t)["orthogonality"])(train)
    assert all(np.any(g) == k.endswith("/lora_a") for k, g in grads.items())


def test_it_leaves_other_adapters_alone():
    """O-LoRA on q beside IncLoRA on v: the penalty knows its own sites only."""
    mine = olora(strength=0.5, targets=("attn/q",), **SMALL)
    b = second_stage(mine, inclora(targets=("attn/v",), **SMALL))
    p = to_numpy(b.world.params)
    want = sum(np.abs(p[f"layers/{i}/attn/q/bank_a"][0] @ p[f"layers/{i}/attn/q/lora_a"].T).sum() for i in range(2))
    np.testing.assert_allclose(terms(mine, b.world.params)["orthogonality"], 0.5 * want, rtol=1e-5)
    assert {k.split("/")[3] for k in b.world.trained} == {"q", "v"}


def test_nothing_to_be_orthogonal_to_in_the_first_stage(tmp_path):
    done = run([olora(strength=0.5, norm_strength=0.1, **SMALL | {"dropout": 0.1})], tmp_path / "out", n=2)
    first, second = ([r["olora/orthogonality"] for r in done.log if r["stage"] == s] for s in (0, 1))
    assert not any(first) and all(second)
    b = {k: v for k, v in done.params.items() if k.endswith("bank_b")}
    assert all(v[0].any() and not v[1:].any() for v in b.values()), "one old adapter, evaluated beside the live one"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"strength": -0.5}, "strength is -0.5"),
        ({"norm_strength": -1.0}, "norm_strength is -1"),
        ({"norm": "l2"}, "did you mean 'l2sq'"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        olora(**arguments)
