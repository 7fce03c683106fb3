"""InfLoRA's directions and subspaces against plain numpy, and what a run makes of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SPEC, STACK, experiment, run, stages, to_numpy

from jaxcl.core.between import Between
from jaxcl.errors import RequestError
from jaxcl.methods.inflora import inflora, moments
from jaxcl.models.decoder import apply
from jaxcl.surgery.subspace import Subspace, directions, grown, nothing

SMALL = {"rank": 2, "stages": 3, "max_stages": 3}
Q = "layers/1/attn/q"


def inputs(seed: int, d: int = 12, n: int = 5) -> np.ndarray:
    """[d, 200] columns in a random subspace of n dimensions, and a little outside it."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d, n)) @ rng.normal(size=(n, 200)) + 0.01 * rng.normal(size=(d, 200))


def second(h: np.ndarray) -> np.ndarray:
    return h @ h.T / h.shape[1]


def by_hand(moments: list[np.ndarray], shares: list[float]) -> np.ndarray:
    """The basis of old inputs by appending one leading direction after another, never its complement."""
    basis = np.zeros((len(moments[0]), 0))
    for c, share in zip(moments, shares, strict=True):
        while np.sum((basis @ basis.T @ c) ** 2) < share * np.sum(c**2):
            rest = c - basis @ basis.T @ c
            basis = np.concatenate([basis, np.linalg.svd(rest)[0][:, :1]], axis=1)
    return basis


@pytest.mark.parametrize("shares", [[0.9, 0.95, 0.99], [0.5, 0.5, 0.5], [0.999, 0.9999, 0.99999]])
def test_the_subspace_is_that_of_one_direction_after_another(shares):
    seen = [second(inputs(i)) for i in range(3)]
    old, before = nothing(12), 0
    for n in range(3):
        old = grown(old, seen[n], shares[n])
        basis = by_hand(seen[: n + 1], shares[: n + 1])
        assert old.dimension == basis.shape[1] >= before
        before = old.dimension
        np.testing.assert_allclose(old.outside(np.eye(12)), np.eye(12) - basis @ basis.T, atol=1e-7)
        np.testing.assert_allclose(old.basis.T @ old.basis, np.eye(old.basis.shape[1]), atol=1e-10)
        assert old.basis.shape[1] <= 6 or old.dimension == 12, "the narrower of the two is kept"


def test_the_first_directions_are_the_leading_ones_of_the_inputs():
    c = second(inputs(0))
    _, vectors = np.linalg.eigh(c)
    found = directions(nothing(12), c, 3)
    np.testing.assert_allclose(found.T @ found, vectors[:, -3:] @ vectors[:, -3:].T, atol=1e-8)


@pytest.mark.parametrize("kept", [2, 5, 9, 11, 12])
def test_later_directions_are_orthonormal_and_do_not_meet_old_inputs(kept):
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    old = Subspace(basis[:, :kept], False)
    found, free = directions(old, second(inputs(2)), 4), min(4, 12 - kept)
    np.testing.assert_allclose(found @ found.T, np.diag([1.0] * free + [0.0] * (4 - free)), atol=1e-9)
    assert np.abs(found @ basis[:, :kept]).max() < 1e-9, "h in the old subspace gives 0"
    again = directions(Subspace(basis[:, kept:], True), second(inputs(2)), 4) if kept < 12 else found
    np.testing.assert_allclose(again.T @ again, found.T @ found, atol=1e-8)


def test_a_decomposition_that_does_not_converge_is_made_by_the_slower_way(monkeypatch):
    """LAPACK's gesdd gives up on some matrices; eigenvectors of C C^T say what is wanted."""
    c, tried = second(inputs(0)), []
    wanted = np.linalg.eigh(c @ c.T)[1][:, -3:]

    def fails(x):
        tried.append(x.shape)
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    found, old = directions(nothing(12), c, 3), grown(nothing(12), c, 0.99)
    np.testing.assert_allclose(found.T @ found, wanted @ wanted.T, atol=1e-7)
    assert tried == [(12, 12)] * 2 and 0 < old.dimension < 12


def test_directions_that_no_input_has_fill_up_the_rank():
    one = np.zeros((12, 12))
    one[3, 3] = 2.0
    found = directions(nothing(12), one, 4)
    np.testing.assert_allclose(np.abs(found[0]), np.eye(12)[3], atol=1e-12)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-12)


@pytest.fixture(scope="module")
def begun() -> Between:
    b = Between(experiment([inflora(**SMALL)], n=2), lambda: None)
    b.begin(0)
    return b


def test_moments_are_of_the_sites_inputs_without_padding(begun):
    """Collected row by row from the model itself; q, k and v of a layer see the same."""
    source, total, count = stages(1)[0].train, 0.0, 0
    params = {k: v for k, v in begun.world.params.items() if "lora" not in k and "bank" not in k}
    for i in range(len(source)):
        row = {k: jnp.asarray(v)[None] for k, v in source[i].items() if k in ("tokens", "segments", "positions")}
        h = np.asarray(apply(SPEC, params, row, taps=(f"{Q}:in",)).taps[f"{Q}:in"], np.float64)[0]
        h = h[np.asarray(row["segments"])[0] > 0]
        total, count = total + h.T @ h, count + len(h)
    found = moments(begun.world, [Q], None)[Q]
    np.testing.assert_allclose(found, total / count, rtol=1e-4, atol=1e-6)
    a = np.asarray(begun.world.params[Q + "/lora_a"], np.float64)
    _, vectors = np.linalg.eigh(total / count)
    np.testing.assert_allclose(3 * a.T @ a, vectors[:, -2:] @ vectors[:, -2:].T, atol=1e-3)


def test_a_stage_begins_as_the_one_before_ended():
    """The adapter of before counts once, in the bank, and the new one gives nothing yet."""
    b, rng = Between(experiment([inflora(**SMALL)], n=2), lambda: None), np.random.default_rng(3)
    b.begin(0)
    assert {k.rpartition("/")[2] for k in b.world.trained} == {"lora_b"}
    trained = {k: jnp.asarray(rng.normal(size=b.world.params[k].shape), jnp.float32) for k in sorted(b.world.trained)}
    row = {k: jnp.asarray(v)[None] for k, v in stages(1)[0].train[0].items()}
    bare = apply(SPEC, b.world.params, row).nll
    b.world = b.world._replace(params=b.world.params | trained)
    ended = apply(SPEC, b.world.params, row).nll
    b.end()
    b.begin(1)
    assert np.abs(ended - bare).max() > 1e-3 and not any(np.any(b.world.params[k]) for k in trained)
    np.testing.assert_allclose(apply(SPEC, b.world.params, row).nll, ended, atol=1e-5)


def test_training_b_is_training_the_kernel_along_a(begun):
    """dL/dB = (dL/dW)^T A^T, so that dB A is dW^T projected onto A's rows, over 3."""
    params = begun.world.params
    row = {k: jnp.asarray(v)[None] for k, v in stages(1)[0].train[0].items()}

    def loss(some):
        return jnp.sum(apply(SPEC, params | some, row).nll * row["weight"])

    g = jax.grad(loss)({k: params[k] for k in (Q + "/kernel", Q + "/lora_b")})
    a = np.asarray(params[Q + "/lora_a"])
    dw = np.asarray(g[Q + "/kernel"]).T
    np.testing.assert_allclose(g[Q + "/lora_b"], dw @ a.T, rtol=1e-4, atol=1e-6)
    projector = a.T @ np.linalg.inv(a @ a.T) @ a
    np.testing.assert_allclose(g[Q + "/lora_b"] @ a, dw @ projector / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_run_keeps_its_designs_and_later_ones_miss_old_inputs(stacked, tmp_path):
    spec = dataclasses.replace(SPEC, segments=STACK) if stacked else SPEC
    done = run([inflora(**SMALL, share=0.5, share_end=0.6)], tmp_path / "out", n=3, spec=spec)
    old = done.loop.now.owns["inflora"]["host"]["old"]
    assert len(old) == 4 and done.compilations == 1
    for site, kept in old.items():
        layer = int(site.split("/")[1])
        key = f"layers/0:2:1/{site.split('/', 2)[2]}" if stacked else site
        a, bank = (done.params[f"{key}/{part}_a"] for part in ("lora", "bank"))
        a, bank = (a[layer], bank[layer]) if stacked else (a, bank)
        designs = np.stack([*bank, a]).astype(np.float64)
        for x in designs:
            np.testing.assert_allclose(3 * x @ x.T, np.eye(2), atol=1e-5)
        # The leading direction of the first stage's inputs is kept. In layer 0 no adapter comes before, and inputs of
        # the stage's start are those of its end; in layer 1 they have moved a little.
        m, first = Subspace(np.asarray(kept["basis"]), kept["complement"]), designs[0][:1].T * 3**0.5
        most = 1e-4 if layer == 0 else 0.05
        assert np.abs(m.outside(first)).max() < most and np.abs(designs[1:] @ first).max() < most
    taken = to_numpy(done.loop.now.world.notes)["inflora"]["taken"]
    assert 0 < taken <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"share": 0.0}, "accepted: 0 < share"),
        ({"share": 0.99, "share_end": 0.9}, "share_end 0.9"),
        ({"stages": 0}, "stages 0"),
        ({"rows": 0}, "rows 0"),
        ({"rank": 0}, "rank 0"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        b = Between(experiment([inflora(**SMALL | arguments)], n=1), lambda: None)
        b.begin(0)
