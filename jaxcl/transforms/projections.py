"""Gradients projected so that they do not raise the loss on memories: A-GEM's one constraint, GEM's many.

Plain functions on any pytree of gradients. Dot products are taken per leaf and summed in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def dot(a: Any, b: Any) -> jax.Array:
    """sum of elementwise products over two pytrees of one structure, f32[]."""
    parts = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return jnp.asarray(sum(jax.tree.leaves(parts)))


def agem(grads: Any, reference: Any) -> Any:
    """g if <g, r> >= 0 else g - <g, r> / <r, r> r (Chaudhry et al. 2019, eq. 11). r = 0 leaves g alone."""
    overlap, size = dot(grads, reference), dot(reference, reference)
    factor = jnp.where((overlap < 0) & (size > 0), overlap / jnp.where(size > 0, size, 1.0), 0.0)
    moved = jax.tree.map(lambda g, r: g - (factor * r.astype(jnp.float32)).astype(g.dtype), grads, reference)
    return jax.tree.map(lambda g, m: jnp.where(factor < 0, m, g), grads, moved)


def gem(grads: Any, references: list[Any], margin: float = 0.5, eps: float = 1e-3, sweeps: int = 100) -> Any:
    """The closest gradient that has a non-negative product with every reference (Lopez-Paz and Ranzato 2017).

    Solves min_v 1/2 v^T (G G^T + eps I) v + (G g)^T v over v >= margin and returns g + G^T v, if any product is
    negative, else g bit for bit. A reference of zeros (an empty memory) takes no part. ``margin`` 0 is the exact
    projection; the paper's code uses 0.5, which moves g along non-violated tasks too once any is violated.
    The quadratic program is solved by ``sweeps`` rounds of exact coordinate descent.
    """
    gram = jnp.stack([jnp.stack([dot(a, b) for b in references]) for a in references])
    overlap = jnp.stack([dot(r, grads) for r in references])
    present = jnp.diagonal(gram) > 0
    v = nonnegative_qp(gram + eps * jnp.eye(len(references)), overlap, jnp.where(present, margin, 0.0), sweeps)
    v = jnp.where(present, v, 0.0)
    violated = jnp.any(overlap < 0)

    def leaf(g: jax.Array, *rs: jax.Array) -> jax.Array:
        added = sum((v[i] * r.astype(jnp.float32) for i, r in enumerate(rs)), jnp.zeros(g.shape, jnp.float32))
        return jnp.where(violated, (g.astype(jnp.float32) + added).astype(g.dtype), g)

    return jax.tree.map(leaf, grads, *references)


def nonnegative_qp(k: jax.Array, b: jax.Array, low: jax.Array, sweeps: int) -> jax.Array:
    """argmin_v 1/2 v^T K v + b^T v subject to v >= low, f32[n], for a positive definite K f32[n,n]."""

    def coordinate(i: int, v: jax.Array) -> jax.Array:
        rest = jnp.dot(k[i], v) - k[i, i] * v[i]
        return v.at[i].set(jnp.maximum(low[i], -(b[i] + rest) / k[i, i]))

    def sweep(_: int, v: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, b.shape[0], coordinate, v)

    return jax.lax.fori_loop(0, sweeps, sweep, jnp.maximum(low, 0.0).astype(jnp.float32))
