"""The subspace that the inputs of a dense site have spanned so far, as DualGPM keeps it, in float64 on the host.

Liang and Li 2024 (arXiv 2404.00228), section 3.3, after Saha et al. 2021. ``moment`` is C = mean(h h^T) f64[d, d] over
inputs h. Energies are squares of C's singular values, so fourth powers of those of the inputs themselves: a threshold
of GPM does not carry over.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg

TINY = 1e-10
"""A singular value below this share of the second moment's norm is rounding."""


class Subspace(NamedTuple):
    """basis: f64[d, k], orthonormal columns: those of M or, with ``complement``, of what M does not span; the fewer."""

    basis: np.ndarray
    complement: bool

    @property
    def dimension(self) -> int:
        """Of the old inputs' subspace."""
        d, k = self.basis.shape
        return d - k if self.complement else k

    def outside(self, x: np.ndarray) -> np.ndarray:
        """(I - M M^T) x for x [d, n]: what is orthogonal to all old inputs."""
        inside = self.basis @ (self.basis.T @ x)
        return inside if self.complement else x - inside


def nothing(width: int) -> Subspace:
    """Before the first stage: the complement is the whole space."""
    return Subspace(np.eye(width), True)


def grown(old: Subspace, moment: np.ndarray, share: float) -> Subspace:
    """``old`` with the fewest leading directions of (I - M M^T) C for which ``share`` of C's energy lies inside."""
    left, values = singular(old.outside(moment))
    energy = np.sum(moment**2)
    inside = energy - np.sum(values**2) + np.concatenate([[0.0], np.cumsum(values**2)])
    found = min(int(np.searchsorted(inside, share * energy)), len(values) - old.dimension)
    added, _ = np.linalg.qr(old.outside(left[:, :found]))
    return _narrower(*_both(old, added))


def directions(old: Subspace, moment: np.ndarray, rank: int) -> np.ndarray:
    """[rank, d]: orthonormal rows, the leading left singular vectors of (I - M M^T) C.

    Directions that no input has fill them up, and rows are zero where old inputs leave none."""
    width = len(moment)
    left, values = singular(old.outside(moment))
    seen = int(np.sum(values[:rank] > TINY * np.linalg.norm(moment)))
    chosen, _ = np.linalg.qr(old.outside(left[:, :seen]))
    more = min(rank, width - old.dimension) - seen
    if more > 0:
        rest = old.outside(np.eye(width)) - chosen @ chosen.T
        chosen = np.concatenate([chosen, range_first(rest)[:, :more]], axis=1)
    return np.concatenate([chosen.T, np.zeros((rank - chosen.shape[1], width))])


def _both(old: Subspace, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a basis of the subspace with ``added`` [d, n], one of its complement)."""
    width = len(added)
    projector = np.eye(width) - old.outside(np.eye(width)) + added @ added.T
    left = range_first(projector)
    k = old.dimension + added.shape[1]
    return left[:, :k], left[:, k:]


def singular(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(left singular vectors [d, d], singular values [d], falling) of x [d, d]: by LAPACK's gesdd and, where that does
    not converge, which happens with values as alike as these, by the slower gesvd."""
    try:
        left, values, _ = np.linalg.svd(x)
    except np.linalg.LinAlgError:
        left, values, _ = scipy.linalg.svd(x, lapack_driver="gesvd")
    return left, values


def range_first(projector: np.ndarray) -> np.ndarray:
    """[d, d]: orthonormal columns, those that a symmetric projector keeps before those that it makes zero."""
    return np.linalg.eigh(projector)[1][:, ::-1]


def _narrower(inside: np.ndarray, free: np.ndarray) -> Subspace:
    return Subspace(free, True) if 0 < free.shape[1] < inside.shape[1] else Subspace(inside, False)
