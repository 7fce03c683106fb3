"""Products and attention with backward passes of their own: values in numpy, gradients by plain differentiation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.attention import Part, attend
from jaxcl.models.products import low_rank, product

RNG = np.random.default_rng(0)


def array(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def pulled(fn, *args):
    """Gradients of a fixed mixture of the outputs, with respect to all arguments."""
    mixture = np.random.default_rng(1).normal(size=jax.eval_shape(fn, *args).shape)
    return jax.grad(lambda *a: jnp.sum(fn(*a) * mixture), tuple(range(len(args))))(*args)


def close(got, want, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize(("wide", "out"), [(5, 9), (9, 5), (4, 4)])
def test_product(wide, out):
    x, kernel = array(2, 3, wide), array(wide, out)
    close(product(x, kernel), np.asarray(x) @ np.asarray(kernel))
    close(pulled(product, x, kernel), pulled(jnp.matmul, x, kernel))


def test_low_rank():
    x, a, b, scale = array(2, 3, 5), array(2, 5), array(7, 2), jnp.float32(0.3)
    plain = lambda x, a, b, scale: scale * (x @ a.T @ b.T)  # noqa: E731
    close(low_rank(x, a, b, scale), plain(*map(np.asarray, (x, a, b, scale))))
    close(pulled(low_rank, x, a, b, scale), pulled(plain, x, a, b, scale))


def count(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("dot_general")


def test_what_is_frozen_is_not_differentiated():
    x, kernel, a, b = array(2, 3, 5), array(5, 7), array(2, 5), array(7, 2)
    by = lambda *which: lambda *args: jax.grad(lambda *z: jnp.sum(product(z[0], z[1]) ** 2), which)(*args)  # noqa: E731
    assert count(by(0, 1), x, kernel) == 3
    assert count(by(0), x, kernel) == 2
    frozen = lambda x: jax.grad(lambda x: jnp.sum(low_rank(x, a, b, jnp.float32(1.0)) ** 2))(x)  # noqa: E731
    assert count(frozen, x) == 4


def test_gradients_through_a_scan_and_a_batch_of_gradients():
    x, kernels = array(3, 4), array(2, 4, 4)

    def through(product, kernels, x):
        return jax.lax.scan(lambda x, k: (jnp.tanh(product(x, k)), None), x, kernels)[0]

    ours, plain = (functools.partial(through, p) for p in (product, jnp.matmul))
    close(pulled(ours, kernels, x), pulled(plain, kernels, x))
    cube = lambda product: lambda k, x: jnp.sum(product(x, k) ** 3)  # noqa: E731
    each = lambda product: jax.vmap(jax.grad(cube(product)), (None, 0))(kernels[0], x)  # noqa: E731
    close(each(product), each(jnp.matmul))


def plain_attention(q, ks, vs, masks, scale):
    """By definition, one query head after another, all keys in one row."""
    k, v, mask = (jnp.concatenate(side, axis=axis) for side, axis in ((ks, 1), (vs, 1), (masks, 2)))
    heads = []
    for h in range(q.shape[2]):
        g = h * k.shape[2] // q.shape[2]
        scores = jnp.einsum("btd,bsd->bts", q[:, :, h], k[:, :, g]) * scale
        prob = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
        heads.append(jnp.einsum("bts,bsd->btd", prob, v[:, :, g]))
    return jnp.stack(heads, axis=2)


@pytest.mark.parametrize("sizes", [(5,), (5, 3)], ids=["a block", "a block and a cache"])
def test_attention(sizes):
    """A query that sees nothing is among them: what it gives depends on values alone."""
    q, masks = array(2, 5, 6, 4), [jnp.asarray(RNG.random((2, 5, s)) < 0.6).at[0, 1].set(False) for s in sizes]
    ks, vs = ([array(2, s, 2, 4) for s in sizes] for _ in range(2))
    ours = lambda q, ks, vs: attend(q, [Part(*p) for p in zip(ks, vs, masks)], 0.7)  # noqa: E731
    plain = lambda q, ks, vs: plain_attention(q, ks, vs, masks, 0.7)  # noqa: E731
    close(ours(q, ks, vs), plain(q, ks, vs))
    close(pulled(ours, q, ks, vs), pulled(plain, q, ks, vs))


def test_attention_with_dropout_on_its_weights():
    q, k, v, more, others = (array(2, t, h, 4) for t, h in ((5, 6), (5, 2), (5, 2), (3, 2), (3, 2)))
    kept = [jnp.asarray((RNG.random((2, 6, 5, s)) < 0.7) / 0.7, jnp.float32) for s in (5, 3)]
    masks = [jnp.asarray(RNG.random((2, 5, s)) < 0.8) for s in (5, 3)]

    def ours(q, ks, vs):
        return attend(q, [Part(k, v, m, kept=f) for k, v, m, f in zip(ks, vs, masks, kept)], 0.7)

    def plain(q, ks, vs):
        keys, values = (jnp.repeat(jnp.concatenate(side, 1), 3, axis=2) for side in (ks, vs))
        scores = jnp.einsum("bthd,bshd->bhts", q, keys) * 0.7
        seen = jnp.where(jnp.concatenate(masks, 2)[:, None], scores, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(seen) * jnp.concatenate(kept, 3), values)

    close(ours(q, [k, more], [v, others]), plain(q, [k, more], [v, others]))
    close(pulled(ours, q, [k, more], [v, others]), pulled(plain, q, [k, more], [v, others]))


def test_attention_in_half_precision_keeps_its_softmax_wide():
    q, k, v = array(1, 40, 2, 8), array(1, 40, 1, 8), array(1, 40, 1, 8)
    mask = jnp.ones((1, 40, 40), bool)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = attend(half[0], [Part(half[1], half[2], mask)])
    want = attend(*[half[0].astype(jnp.float32)], [Part(*(x.astype(jnp.float32) for x in half[1:]), mask)])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)
