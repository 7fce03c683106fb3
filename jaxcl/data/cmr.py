"""The query stream of continual model refinement: how many queries of which cluster come when.

Lin et al. 2022 (CMR, arXiv 2205.02014); card refine-align/cmr-benchmark. Queries come from an upstream set, which fades
away, and from clusters out of its distribution, one of which is the majority until it changes. Nothing tells where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxcl.errors import RequestError

UPSTREAM = "upstream"


class Counts(NamedTuple):
    """Queries of one step: of the upstream set, of the major cluster, of each other cluster, and of one other cluster
    that is drawn to fill the batch."""

    upstream: int
    major: int
    each_other: int
    leftover: int


class Mix(NamedTuple):
    """batch: queries a step. alpha: what is left of the upstream share after a step. beta: probability that the major
    cluster stays. gamma: its share of the queries that are not upstream."""

    batch: int = 64
    alpha: float = 0.9
    beta: float = 0.5
    gamma: float = 0.8

    def check(self) -> Mix:
        """Itself. RequestError: a batch below 1, or a share outside 0 to 1."""
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise RequestError(f"batch={self.batch!r} queries a step; accepted: a whole number of at least 1")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RequestError(f"{name}={value!r}; accepted: a number from 0 to 1")
        return self

    def counts(self, t: int, clusters: int) -> Counts:
        """What step ``t`` (from 1) draws, with ``clusters`` (at least 2) out of distribution. Rounds half to even."""
        upstream = round(self.batch * self.alpha ** (t - 1)) if self.alpha else 0
        rest = self.batch - upstream
        major = round(rest * self.gamma)
        each = (rest - major) // (clusters - 1)
        return Counts(upstream, major, each, rest - major - each * (clusters - 1))


Query = tuple[str, int]
"""Cluster (or `UPSTREAM`) and number of the row in it."""


def query_stream(
    upstream: int, clusters: Mapping[str, int], steps: int, mix: Mix, *, seed: int
) -> list[tuple[str, list[Query]]]:
    """(major cluster, queries) of every step; the same seed gives the same stream.

    upstream, clusters: sizes of the pools, {cluster: rows}. Rows are drawn without replacement inside a step and may
    come again in another one. RequestError: fewer than two clusters, or a pool that is smaller than what a step draws.
    """
    mix.check()
    if len(clusters) < 2:
        raise RequestError(f"{len(clusters)} clusters out of distribution; accepted: at least 2")
    names, rng = list(clusters), np.random.default_rng([seed, 23])
    pools = {UPSTREAM: upstream, **clusters}
    major = names[rng.integers(len(names))]
    out = []
    for t in range(1, steps + 1):
        others = [name for name in names if name != major]
        count = mix.counts(t, len(names))
        wanted = {UPSTREAM: count.upstream, major: count.major, **dict.fromkeys(others, count.each_other)}
        wanted[others[rng.integers(len(others))]] += count.leftover
        out.append((major, [q for name, n in wanted.items() for q in _drawn(name, n, pools[name], t, rng)]))
        if rng.random() >= mix.beta:
            major = others[rng.integers(len(others))]
    return out


def _drawn(name: str, n: int, size: int, t: int, rng: np.random.Generator) -> list[Query]:
    if n > size:
        raise RequestError(f"step {t} draws {n} queries of {name!r}, which has {size}; take a smaller batch")
    return [(name, int(i)) for i in rng.choice(size, n, replace=False)]
