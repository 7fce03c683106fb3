"""MoFO: the selection against a sort in numpy, the update against Adam, and a loop that knows no Method."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from jaxcl.errors import RequestError
from jaxcl.losses.penalties import orthogonality
from jaxcl.transforms.mofo import mofo, scale_by_mofo, top_mask, unfiltered

rng = np.random.default_rng(0)


def sorted_mask(x: np.ndarray, k: int) -> np.ndarray:
    """The k largest by a stable sort: the lowest index first among equals."""
    chosen = np.argsort(-x.ravel(), kind="stable")[:k]
    mask = np.zeros(x.size, bool)
    mask[chosen] = True
    return mask.reshape(x.shape)


CASES = {
    "random": rng.random((7, 9)).astype(np.float32),
    "ties": rng.integers(0, 4, (8, 8)).astype(np.float32),
    "all equal": np.full((5, 5), 0.25, np.float32),
    "zeros": np.zeros(12, np.float32),
    "one value": np.array([3.0], np.float32),
    "wide range": np.float32(10.0) ** rng.integers(-30, 30, 50).astype(np.float32),
    "tiny": np.array([0, 1e-45, 1e-40, 1e-38, 2e-38, 0], np.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_top_mask_equals_a_stable_sort(name):
    x, mask = CASES[name], jax.jit(top_mask)
    for k in sorted({1, 2, x.size // 3, x.size // 2, x.size - 1, x.size} & set(range(1, x.size + 1))):
        found = np.asarray(mask(x, k))
        assert found.shape == x.shape and found.sum() == k
        assert np.array_equal(found, sorted_mask(x, k)), k


def params() -> dict:
    """Nested, with a leaf of each kind."""
    draw = np.random.default_rng(1)
    shapes = {"dense": {"kernel": (6, 10), "bias": (10,)}, "norm": {"scale": (6,)}, "head": {"kernel": (10, 3)}}
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s), jnp.float32), shapes, is_leaf=is_shape)


def gradients(steps: int) -> list[dict]:
    draw = np.random.default_rng(2)
    return [jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params()) for _ in range(steps)]


def walk(tx, steps: int = 4, scale: float = 1.0) -> tuple[list[dict], object]:
    """Weights after every step, and the optimizer's last state."""
    p, state, seen = params(), None, []
    state = tx.init(p)
    update = jax.jit(tx.update)
    for g in gradients(steps):
        u, state = update(jax.tree.map(lambda x: scale * x, g), state, p)
        p = optax.apply_updates(p, u)
        seen.append(p)
    return seen, state


def leaves(tree) -> dict[str, np.ndarray]:
    return {"/".join(k.key for k in path): np.asarray(v) for path, v in jax.tree_util.tree_leaves_with_path(tree)}


def changed(before, after) -> dict[str, np.ndarray]:
    a, b = leaves(before), leaves(after)
    return {k: a[k] != b[k] for k in a}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fraction_one_is_adamw_bit_for_bit(decay):
    ours = walk(mofo(1e-2, fraction=1.0, weight_decay=decay))[0]
    reference = walk(optax.adamw(1e-2, weight_decay=decay) if decay else optax.adam(1e-2))[0]
    for a, b in zip(ours, reference):
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.99])
def test_exactly_k_entries_of_a_filtered_tensor_change(fraction):
    seen = [params(), *walk(mofo(1e-2, fraction=fraction))[0]]
    for before, after in itertools.pairwise(seen):
        for path, moved in changed(before, after).items():
            filtered = not unfiltered(path)
            assert moved.sum() == (max(1, int(moved.size * fraction)) if filtered else moved.size), path


def test_the_selected_entries_have_the_largest_momentum():
    """Momentum and Adam's direction written out in float64."""
    b1, b2, eps, lr, k = 0.9, 0.999, 1e-8, 1e-2, int(60 * 0.2)
    p = {k: v.astype(np.float64) for k, v in leaves(params()).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, (g, found) in enumerate(zip(gradients(4), walk(mofo(lr, fraction=0.2))[0]), start=1):
        for name, grad in leaves(g).items():
            m[name] = b1 * m[name] + (1 - b1) * grad
            v[name] = b2 * v[name] + (1 - b2) * grad**2
        name = "dense/kernel"
        step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
        p[name] = p[name] - lr * step * sorted_mask(np.abs(m[name]), k)
        np.testing.assert_allclose(leaves(found)[name], p[name], rtol=1e-4, atol=1e-6)


def test_moments_do_not_depend_on_the_fraction():
    states = [walk(scale_by_mofo(fraction=f))[1] for f in (0.05, 0.5, 1.0)]
    adam = walk(optax.scale_by_adam())[1]
    for state in states:
        assert jax.tree.structure(state) == jax.tree.structure(adam)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(adam)))


def test_one_step_is_no_longer_than_adams():
    start = leaves(params())
    adam = leaves(walk(optax.adam(1e-2), 1)[0][0])
    for fraction in (0.05, 0.3, 0.9):
        ours = leaves(walk(mofo(1e-2, fraction=fraction), 1)[0][0])
        for k in start:
            assert np.linalg.norm(ours[k] - start[k]) <= np.linalg.norm(adam[k] - start[k])


def test_the_selection_knows_no_learning_rate_and_no_scale_of_the_gradient():
    base = [params(), *walk(mofo(1e-2, fraction=0.2))[0]]
    for lr, scale in ((3e-4, 1.0), (1e-2, 8.0)):
        other = [params(), *walk(mofo(lr, fraction=0.2), scale=scale)[0]]
        for i in range(4):
            a, b = changed(base[i], base[i + 1]), changed(other[i], other[i + 1])
            assert all(np.array_equal(a[k], b[k]) for k in a)


def test_permuted_entries_are_selected_as_the_unpermuted():
    """No ties here, so the order of indices does not matter."""
    order = rng.permutation(60)
    g = jnp.asarray(rng.normal(size=60), jnp.float32)
    tx = scale_by_mofo(fraction=0.2)
    for grad in (g, g * 2):
        state = tx.init({"w": g})
        plain = tx.update({"w": grad}, state)[0]["w"]
        mixed = tx.update({"w": grad[order]}, state)[0]["w"]
        assert np.array_equal(mixed, plain[order])


def test_a_stacked_leaf_is_filtered_layer_by_layer():
    g = jnp.asarray(rng.normal(size=(4, 5, 8)) * np.array([1, 10, 100, 1000])[:, None, None], jnp.float32)
    tx = scale_by_mofo(fraction=0.1)
    stack = tx.update({"layers/0:4:1/mlp/up/kernel": g}, tx.init({"layers/0:4:1/mlp/up/kernel": g}))[0]
    counts = np.count_nonzero(np.asarray(stack["layers/0:4:1/mlp/up/kernel"]), axis=(1, 2))
    assert counts.tolist() == [4, 4, 4, 4]
    for i in range(4):
        one = tx.update({"k": g[i]}, tx.init({"k": g[i]}))[0]["k"]
        assert np.array_equal(stack["layers/0:4:1/mlp/up/kernel"][i], one)
    plain = tx.update({"k": g}, tx.init({"k": g}))[0]["k"]
    assert np.count_nonzero(np.asarray(plain[:3])) == 0, "as one tensor, the largest layer takes all"


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_bad_fractions(fraction):
    with pytest.raises(RequestError, match=f"fraction is {fraction}"):
        mofo(fraction=fraction)


def test_a_plain_loop_over_nested_parameters():
    """Thirty lines of Flax's TrainState: a transform and a penalty of this library, nothing else of it."""
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=(64, 8)).astype(np.float32), draw.normal(size=(64, 4)).astype(np.float32)
    old = jnp.asarray(draw.normal(size=(2, 2, 8)), jnp.float32)
    start = {"dense": {"kernel": jnp.zeros((8, 4))}, "adapter": {"a": old[0] + 0.1, "b": jnp.zeros((4, 2))}}

    def apply_fn(p, x):
        return x @ p["dense"]["kernel"] + x @ p["adapter"]["a"].T @ p["adapter"]["b"].T

    def loss_fn(p):
        overlap = orthogonality(p["adapter"]["a"], old, "l2sq")
        return jnp.mean((apply_fn(p, x) - y) ** 2) + 0.01 * overlap, overlap

    @jax.jit
    def step(state):
        (loss, overlap), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), loss, overlap

    tx = optax.chain(scale_by_mofo(fraction=0.25), optax.scale(-0.02))
    state, seen = TrainState.create(apply_fn=apply_fn, params=start, tx=tx), []
    for _ in range(150):
        before = state.params
        state, loss, overlap = step(state)
        seen.append((float(loss), float(overlap)))
        moved = changed(before, state.params)
        assert moved["dense/kernel"].sum() <= 8 and moved["adapter/a"].sum() <= 4
    assert seen[-1][0] < 0.8 * seen[0][0] and seen[-1][1] < 0.2 * seen[0][1]
