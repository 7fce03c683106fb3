"""Penalties on parameters, as plain functions of arrays and pytrees. All sums are in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path


def quadratic(params: Any, anchor: Any, weight: Any) -> jax.Array:
    """1/2 sum_i weight_i (params_i - anchor_i)^2 over the leaves of ``weight`` (Kirkpatrick et al. 2017, eq. 3).

    Any pytrees; leaves belong together by their path, and those that ``weight`` or ``params`` lacks do not count.
    Leaves with an extra leading axis (several anchors) are summed over it. Returns f32[].
    """
    theta, centre = dict(tree_leaves_with_path(params)), dict(tree_leaves_with_path(anchor))
    total = jnp.zeros((), jnp.float32)
    for path, w in tree_leaves_with_path(weight):
        if path in theta:
            difference = theta[path].astype(jnp.float32) - centre[path].astype(jnp.float32)
            total += jnp.sum(w.astype(jnp.float32) * jnp.square(difference))
    return 0.5 * total


def orthogonality(new: jax.Array, bank: jax.Array, norm: str = "l1") -> jax.Array:
    """Overlap of a new adapter's rows with those of a bank (Wang et al. 2023, O-LoRA).

    new: [..., r, in]; bank: [..., S, r, in], empty slots zero. ``l1``: sum |A_old A^T| entrywise (the reference
    code); ``l2sq``: sum of its squares (the paper). Returns f32[].
    """
    overlap = jnp.einsum("...sri,...qi->...srq", bank.astype(jnp.float32), new.astype(jnp.float32))
    return jnp.sum(jnp.abs(overlap) if norm == "l1" else jnp.square(overlap))


def frobenius(x: jax.Array, axes: int = 2) -> jax.Array:
    """Sum over leading axes of the Frobenius norm of the last ``axes`` axes; its gradient at 0 is 0. f32[]."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(-axes, 0)))
    safe = jnp.where(square > 0, square, 1.0)
    return jnp.sum(jnp.where(square > 0, jnp.sqrt(safe), 0.0))


def half_square_distance(params: Any, anchor: Any) -> jax.Array:
    """1/2 ||params - anchor||^2 over the leaves of ``anchor`` that ``params`` has, by their paths. f32[]."""
    theta, total = dict(tree_leaves_with_path(params)), jnp.zeros((), jnp.float32)
    for path, centre in tree_leaves_with_path(anchor):
        if path in theta:
            total += jnp.sum(jnp.square(theta[path].astype(jnp.float32) - centre.astype(jnp.float32)))
    return 0.5 * total


def square_of_product(left: jax.Array, right: jax.Array, dense: jax.Array | None = None) -> jax.Array:
    """||left right + dense^T||_F^2 of factors [..., out, R] and [..., R, in] and a matrix [..., in, out], f32[].

    The product is never formed: ||L R||^2 = <L^T L, R R^T>, which is R x R, and its product with ``dense`` is taken by
    way of dense L. Leading axes are summed over.
    """
    with jax.default_matmul_precision("highest"):
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        grams = jnp.einsum("...or,...oq->...rq", left, left), jnp.einsum("...ri,...qi->...rq", right, right)
        total = jnp.sum(grams[0] * grams[1])
        if dense is not None:
            dense = dense.astype(jnp.float32)
            total += jnp.sum(jnp.square(dense)) + 2.0 * jnp.sum(right * jnp.einsum("...io,...or->...ri", dense, left))
    return total
