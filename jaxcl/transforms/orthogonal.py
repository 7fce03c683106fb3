"""An orthonormal basis of directions in parameter space, and what of a gradient lies outside it.

A basis is {path: f32[K, *shape]}: K vectors, each over all leaves together; vector i is entry i of every leaf. Unused
ones are zeros. Plain functions on flat dicts; all products are taken in full float32, because in bfloat16 a basis loses
its orthogonality after a few dozen vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Basis = dict[str, jax.Array]
Vector = Mapping[str, jax.Array]


def empty(like: Vector, slots: int) -> Basis:
    """A basis of no vectors with room for ``slots``, on the devices that hold ``like``."""
    return {k: jnp.broadcast_to(jnp.zeros_like(v, jnp.float32), (slots, *v.shape)) + 0.0 for k, v in like.items()}


def slots(basis: Vector) -> int:
    """How many vectors a basis has room for."""
    return next(iter(basis.values())).shape[0]


def coordinates(basis: Vector, vector: Vector) -> jax.Array:
    """f32[K]: products with every vector of the basis, over the leaves of the basis."""
    with jax.default_matmul_precision("highest"):
        parts = [jnp.tensordot(u, vector[k].astype(jnp.float32), vector[k].ndim) for k, u in basis.items()]
    return jnp.asarray(sum(parts))


def outside(vector: Vector, basis: Vector) -> dict[str, jax.Array]:
    """The vector less its orthogonal projection onto the basis; leaves that the basis lacks stay.

    Where the vector has some of the leaves only (the others do not move), it is projected onto what those see of the
    basis, which is not orthonormal: the slice of a projector is no projector.
    """
    seen = {k: u for k, u in basis.items() if k in vector}
    if not seen:
        return dict(vector)
    along = coordinates(seen, vector)
    with jax.default_matmul_precision("highest"):
        if seen.keys() != basis.keys():
            rows = [u.reshape(u.shape[0], -1) for u in seen.values()]
            along = jnp.linalg.pinv(jnp.asarray(sum(u @ u.T for u in rows)), hermitian=True) @ along
        away = {k: vector[k].astype(jnp.float32) - jnp.tensordot(along, u, 1) for k, u in seen.items()}
    return {k: away[k].astype(v.dtype) if k in away else v for k, v in vector.items()}


def extend(basis: Basis, count: jax.Array, vectors: Vector, least: float = 1e-5) -> tuple[Basis, jax.Array]:
    """(basis, count i32[]) after the N vectors f32[N, *shape] were added to its first ``count``, one after another.

    Each is scaled to length 1, freed of the basis twice (once leaves rounding behind) and, if more than ``least`` is
    left of it, scaled again and written into the next slot; zeros, what the basis spans, and what finds no slot free
    are dropped. Modified Gram-Schmidt with re-orthogonalisation (Daniel et al. 1976).
    """

    def add(carry: tuple[Basis, jax.Array], vector: Vector) -> tuple[tuple[Basis, jax.Array], None]:
        basis, count = carry
        whole = norm(vector)
        rest = {k: v.astype(jnp.float32) / jnp.where(whole > 0, whole, 1.0) for k, v in vector.items()}
        rest = outside(outside(rest, basis), basis)
        left = norm(rest)
        new = (left > least) & (count < slots(basis))
        slot = jnp.where(new, count, slots(basis))  # past the last one: dropped
        basis = {k: u.at[slot].set(rest[k] / jnp.where(left > 0, left, 1.0), mode="drop") for k, u in basis.items()}
        return (basis, count + new.astype(count.dtype)), None

    return jax.lax.scan(add, (basis, count), {k: vectors[k] for k in basis})[0]


def norm(vector: Vector) -> jax.Array:
    """Length over all leaves together, f32[]; of the largest entry's size, so that no square overflows or vanishes."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(v.astype(jnp.float32))) for v in vector.values()]))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(sum(jnp.sum(jnp.square(v.astype(jnp.float32) / scale)) for v in vector.values()))
