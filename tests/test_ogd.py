"""OGD: the basis against numpy's, the promise on a linear model, and the directions that a run collects."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, Answers, run, to_numpy

from jaxcl.core.types import Clock, Outputs
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora
from jaxcl.methods.ogd import gold_gradients, ogd
from jaxcl.transforms.orthogonal import coordinates, empty, extend, outside

rng = np.random.default_rng(0)
SHAPES = {"a": (6, 5), "b": (10,)}
SIZE = 40


def tree(flat: np.ndarray) -> dict:
    """[..., 40] as two leaves."""
    flat = jnp.asarray(flat, jnp.float32)
    return {"a": flat[..., :30].reshape(*flat.shape[:-1], 6, 5), "b": flat[..., 30:]}


def flat(t: dict, lead: int = 0) -> np.ndarray:
    return np.concatenate([np.asarray(t[k], np.float64).reshape(*t[k].shape[:lead], -1) for k in sorted(t)], -1)


def of(vectors: np.ndarray, room: int, basis=None, count: int = 0) -> tuple[dict, int]:
    basis = empty(tree(np.zeros(SIZE)), room) if basis is None else basis
    basis, count = jax.jit(extend)(basis, jnp.int32(count), tree(vectors))
    return basis, int(count)


@pytest.fixture(scope="module")
def nearly() -> np.ndarray:
    """Twenty vectors of very different lengths that all but lie in a plane."""
    plane = rng.normal(size=(20, 2)) @ rng.normal(size=(2, SIZE))
    return (plane + 1e-3 * rng.normal(size=(20, SIZE))) * np.logspace(-12, 12, 20)[:, None]


def test_a_basis_is_orthonormal_and_spans_what_was_added(nearly):
    basis, count = of(nearly, 24)
    u = flat(basis, 1)
    assert count == 20 and not u[20:].any()
    np.testing.assert_allclose(u[:20] @ u[:20].T, np.eye(20), atol=1e-5)
    units = nearly / np.linalg.norm(nearly, axis=1, keepdims=True)
    np.testing.assert_allclose((units @ u.T) @ u, units, atol=1e-5)


def test_what_is_there_already_zeros_and_what_finds_no_room_leave_it_as_it_is(nearly):
    basis, count = of(nearly, 20)
    again = of(np.stack([nearly[3], -7 * nearly[0] / np.linalg.norm(nearly[0]), np.zeros(SIZE)]), 20, basis, count)
    more = of(rng.normal(size=(2, SIZE)), 20, basis, count)
    for found, n in (again, more):
        assert n == 20 and all(np.array_equal(found[k], basis[k]) for k in basis)


def test_outside_is_an_orthogonal_projector(nearly):
    basis, _ = of(nearly, 24)
    g = rng.normal(size=SIZE)
    got = outside(tree(g), basis)
    q, _ = np.linalg.qr((nearly / np.linalg.norm(nearly, axis=1, keepdims=True)).T)
    np.testing.assert_allclose(flat(got), g - q @ (q.T @ g), atol=1e-3)  # the vectors are known in float32
    assert np.abs(coordinates(basis, got)).max() < 1e-5 and np.linalg.norm(flat(got)) <= np.linalg.norm(g)
    np.testing.assert_allclose(flat(outside(got, basis)), flat(got), atol=1e-5)
    whole, count = of(np.eye(SIZE), SIZE)
    assert count == SIZE and np.abs(flat(outside(tree(g), whole))).max() < 1e-5
    nothing = outside(tree(g), empty(tree(g), 3))
    assert all(np.array_equal(nothing[k], tree(g)[k]) for k in nothing), "bit for bit"


def test_where_some_leaves_move_only_they_are_projected_on_what_they_see_of_the_basis():
    """The slice of an orthonormal basis is not orthonormal: g - U (U^T g) with it leaves a part behind."""
    basis, _ = of(rng.normal(size=(5, SIZE)), 8)
    g = rng.normal(size=10).astype(np.float32)
    got = outside({"b": jnp.asarray(g), "c": jnp.ones(2)}, basis)
    seen = np.asarray(basis["b"], np.float64)[:5]
    want = g - seen.T @ np.linalg.solve(seen @ seen.T, seen @ g)
    np.testing.assert_allclose(got["b"], want, atol=1e-4)
    assert np.abs(seen @ want).max() < 1e-6 and np.abs(seen @ (g - seen.T @ (seen @ g))).max() > 0.01
    assert np.array_equal(got["c"], np.ones(2)), "what the basis does not know stays"


class Words:
    """Logits x W over three words."""

    def __call__(self, train, batch):
        return Outputs(hidden=batch["x"])

    def logits(self, train, out, at):
        return jnp.take_along_axis(out.hidden @ train["w"], at[..., None], 1)


def test_directions_are_gradients_of_gold_logits_of_single_rows():
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    tokens, at = np.array([[0, 1, 2, 1], [2, 2, 0, 0], [1, 1, 1, 1]]), np.array([[1, 2], [3, 0], [1, 2]])
    weight, row = np.array([[1, 1], [0.5, 0], [1, 1]], np.float32), np.array([0, 1, -1])
    batch = {"x": x, "tokens": tokens, "targets_at": at, "weight": weight, "row": row}
    got = gold_gradients(Words(), {"w": jnp.zeros((5, 3))}, batch, None)["w"]
    want = np.zeros((3, 5, 3))
    want[0, :, 1] += x[0, 0] / 2  # token 1 after position 0, token 2 after position 1
    want[0, :, 2] += x[0, 1] / 2
    want[1, :, 0] += x[1, 2]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_on_a_linear_model_predictions_on_stored_rows_stay():
    """f = theta^T x under squared loss: the gradient of f is x. A later task moves everything else."""
    old, new = rng.normal(size=(6, SIZE)), rng.normal(size=(12, SIZE))
    basis, _ = of(old, 6)
    theta, goal = rng.normal(size=SIZE), rng.normal(size=12)

    def squared(train, batch, key, *, terms=True):
        residual = new @ flat(train) - goal
        return tree(residual @ new / 12), {}

    method, ends = ogd(rows=6), {}
    for own in (None, {"fixed": {"basis": basis}}):
        grad = squared if own is None else method.grad(squared, own, Clock.at())
        now = tree(theta)
        for _ in range(60):
            now = jax.tree.map(lambda p, g: p - 0.1 * g, now, grad(now, {}, None)[0])
        ends["plain" if own is None else "ogd"] = flat(now)
    moved = {k: np.abs(old @ (v - theta)).max() for k, v in ends.items()}
    assert moved["ogd"] < 1e-4 < 0.1 < moved["plain"]
    assert np.mean((new @ ends["ogd"] - goal) ** 2) < 0.2 * np.mean((new @ theta - goal) ** 2), "and it learns"


def test_only_the_exact_form_projects_what_an_optimizer_made_of_the_gradient():
    basis, _ = of(rng.normal(size=(5, SIZE)), 6)
    own, grads = {"fixed": {"basis": basis}}, tree(rng.normal(size=SIZE))
    method = ogd(rows=2, exact=True)
    projected, _ = method.grad(lambda *_, terms: (grads, {}), own, None)({}, {}, None)
    tx = optax.adam(0.1)
    updates, _ = tx.update(projected, tx.init(projected))
    assert np.abs(coordinates(basis, updates)).max() > 0.01, "Adam brings the directions back"
    assert np.abs(coordinates(basis, method.project(updates, {}, own, None))).max() < 1e-6
    assert ogd().project is None


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Three stages on a basis made for one, by SGD on adapters."""
    methods = [ogd(rows=4, max_stages=1), lora(rank=2, alpha=8.0, dropout=0.0)]
    return run(methods, tmp_path_factory.mktemp("ogd") / "out", tx=optax.sgd(0.05))


def test_a_basis_that_is_full_doubles_with_one_new_compilation(grown):
    own = to_numpy(grown.loop.now.owns["ogd"]["fixed"])
    u = flat(own["basis"], 1)
    assert grown.compilations == 2 and own["basis"].keys() == grown.loop.now.world.trained
    assert u.shape[0] == 16 and own["count"] == 12, "room for 4, then 8, then 16"
    np.testing.assert_allclose(u[:12] @ u[:12].T, np.eye(12), atol=1e-5)


def test_the_last_stages_directions_are_gradients_at_its_end(grown):
    """Four rows of stage 2 at the final weights, by the model itself, lie in the basis; others do not."""
    params = {k: jnp.asarray(v) for k, v in grown.params.items()}
    own, source = grown.loop.now.owns["ogd"]["fixed"], Answers("s2", 16, seed=2)

    @jax.jit
    def gradient(row):
        def logit(train):
            out = MODEL.apply(SPEC, params | train, jax.tree.map(lambda x: x[None], row))
            scores = MODEL.head(SPEC, params | train, out.hidden, jnp.maximum(row["targets_at"] - 1, 0)[None])[0]
            gold = scores[jnp.arange(len(scores)), row["tokens"][row["targets_at"]]]
            return jnp.sum(row["weight"] * gold) / jnp.sum(row["weight"])

        return jax.grad(logit)({k: params[k] for k in own["basis"]})

    left = []
    for i in range(16):
        g = gradient(source[i])
        left.append(np.linalg.norm(flat(outside(g, own["basis"]))) / np.linalg.norm(flat(g)))
    assert sum(x < 1e-3 for x in left) >= 4 and max(left) > 0.01


def test_a_stage_too_many_is_refused_where_it_may_not_grow():
    method = ogd(rows=4, max_stages=2, grow=False)
    with pytest.raises(RequestError, match="stage 3 exceeds max_stages=2"):
        method.begin(SimpleNamespace(stage=2, edits=()), {"fixed": {}})


@pytest.mark.parametrize("bad", [{"rows": -1}, {"max_stages": 0}])
def test_bad_values_are_refused(bad):
    with pytest.raises(RequestError, match="accepted: rows >= 0, max_stages >= 1"):
        ogd(**bad)
