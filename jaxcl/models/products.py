"""Matrix products of the dense sites, their backward passes written out.

Differentiation on its own contracts a weight's gradient with the output's gradient first, which XLA's CPU back end then
writes once more, transposed: a third of the time of a step. Here the smaller operand goes first (a layer's input is
transposed once for all sites that read it), and nothing is computed or kept for a weight that is not differentiated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Gradients = tuple[jax.Array | None, ...]


def given(g: Any) -> jax.Array:
    """An output's gradient as an array; where nothing depends on the output, JAX hands over a symbol."""
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def over_rows(first: jax.Array, second: jax.Array) -> jax.Array:
    """sum over all leading axes of first [..., m] times second [..., n] -> [m, n]."""
    rows = tuple(range(first.ndim - 1))
    return jax.lax.dot_general(first, second, ((rows, rows), ((), ())))


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times kernel [in, out] -> [..., out]."""
    return x @ kernel


def _product(x: Any, kernel: Any) -> tuple[jax.Array, tuple]:
    kept = x.value if kernel.perturbed else None
    return x.value @ kernel.value, (kept, kernel.value)


def _product_back(kept: tuple, g: Any) -> Gradients:
    x, kernel = kept
    g = given(g)
    dx = g @ kernel.T
    if x is None:
        return dx, None
    wide, out = kernel.shape
    return dx, over_rows(x, g) if wide <= out else over_rows(g, x).T


product.defvjp(_product, _product_back, symbolic_zeros=True)


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """scale (x a^T) b^T for x [..., in], a [r, in], b [out, r], scale [] -> [..., out] (Hu et al. 2021, eq. 3)."""
    return ((x @ a.T) * scale) @ b.T


def _low_rank(x: Any, a: Any, b: Any, scale: Any) -> tuple[jax.Array, tuple]:
    inner = x.value @ a.value.T
    trained = a.perturbed or b.perturbed or scale.perturbed
    kept = (x.value, inner) if trained else None
    return (inner * scale.value) @ b.value.T, (kept, a.value, b.value, scale.value)


def _low_rank_back(kept: tuple, g: Any) -> Gradients:
    trained, a, b, scale = kept
    g = given(g)
    back = g @ b
    dx = (back * scale) @ a
    if trained is None:
        return dx, None, None, None
    x, inner = trained
    da, db = over_rows(back * scale, x), over_rows(inner * scale, g).T
    return dx, da, db, jnp.sum(inner * back).astype(scale.dtype)


low_rank.defvjp(_low_rank, _low_rank_back, symbolic_zeros=True)
