"""What a layer needs beside its input, and where it leaves what a tap asked for. Lives inside one trace."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from ..core.types import Inject
from .rope import Rope


@dataclasses.dataclass(kw_only=True)
class SiteFlow:
    """What dense sites need. bank: f32[B,S] weights of adapter slots, or None for ones. rate: adapter dropout;
    own_rate: that of the model itself; key None is none of either. wanted, seen: taps of this layer by their local
    name. injected: functions that replace a dense site's output, by local site. notes: arrays that these, or the site
    itself, left. real: bool[B,T], which positions hold a token, or None for all. skip: positions of a soft prompt
    before the tokens (taps, injections and notes see none).
    """

    bank: jax.Array | None = None
    rate: float = 0.0
    own_rate: float = 0.0
    key: jax.Array | None = None
    real: jax.Array | None = None
    skip: int = 0
    wanted: frozenset[str] = frozenset()
    seen: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    injected: Mapping[str, Inject] = dataclasses.field(default_factory=dict)
    notes: dict[str, dict[str, jax.Array]] = dataclasses.field(default_factory=dict)

    def at(self, layer: Any, wanted: frozenset[str], injected: Mapping[str, Inject]) -> Self:
        """The same for one layer (a number, or a traced one inside a scan): own random numbers, taps, injections."""
        key = None if self.key is None else jax.random.fold_in(self.key, layer)
        return dataclasses.replace(self, key=key, wanted=wanted, seen={}, injected=injected, notes={})

    def through(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """The output ``y`` of a dense site with input ``x``, or what was injected in its place."""
        if site not in self.injected:
            return y
        new, notes = self.injected[site](x[:, self.skip :], y[:, self.skip :])
        self.note(site, notes)
        return jnp.concatenate([y[:, : self.skip], new], axis=1) if self.skip else new

    def note(self, site: str, values: dict[str, jax.Array]) -> None:
        """Leaves arrays of a site beside what else was left there."""
        self.notes[site] = {**self.notes.get(site, {}), **values}

    def total(self, values: jax.Array) -> jax.Array:
        """[B,...]: the sum of [B,T,...] over every row's tokens, padding and a soft prompt left out."""
        if self.real is not None:
            values = jnp.where(self.real.reshape(*self.real.shape, *(1,) * (values.ndim - 2)), values, 0)
        return jnp.sum(values[:, self.skip :], axis=1)

    def see(self, name: str, value: jax.Array) -> None:
        """Keeps ``value`` if a tap of this name was asked for."""
        if name in self.wanted:
            self.seen[name] = value[:, self.skip :]

    def drop(self, site: str, x: jax.Array) -> jax.Array:
        """Inverted dropout on an adapter's input; the same numbers however layers are stacked."""
        return self.dropped(site, x, self.rate)

    def own(self, place: str, x: jax.Array) -> jax.Array:
        """The model's own dropout at a place of the layer."""
        return self.dropped(f"{place} of the model", x, self.own_rate)

    def dropped(self, name: str, x: jax.Array, rate: float) -> jax.Array:
        """x, or where there is dropout a share ``rate`` of it zero and the rest larger."""
        if self.key is None or rate == 0.0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, zlib.crc32(name.encode())), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(kw_only=True)
class CacheFlow(SiteFlow):
    """What attention needs beside, of any architecture. block: bool [B,T,T], who sees whom inside the block. past: bool
    [B,T,S], who sees which cache slot, or None. slots: i32[B,T], where new keys go (``size`` is nowhere), or None
    without a cache. mode: what happens to the cache, see `jaxcl.models.cache`. prefix: what the prefixes'
    network made of its rows [p,N], or None, see `jaxcl.models.prefix`.
    """

    block: jax.Array
    past: jax.Array | None = None
    slots: jax.Array | None = None
    mode: str | None = None
    size: int = 0
    prefix: jax.Array | None = None


@dataclasses.dataclass(kw_only=True)
class Flow(CacheFlow):
    """A decoder's. rope: cos and sin of the block's positions."""

    rope: Rope

    def local(self, rope: Rope, positions: jax.Array, window: int) -> Flow:
        """The same for layers that see the last ``window`` tokens only, the token itself included.

        positions i32[B,T] of the block's tokens; a cache slot's position is its number.
        """
        block, past = self.block & near(positions, positions, window), self.past
        if past is not None:
            past = past & near(positions, jnp.arange(past.shape[-1])[None], window)
        return dataclasses.replace(self, rope=rope, block=block, past=past)


def near(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array:
    """bool [B,T,S]: whether the key at position [B,S] is fewer than ``window`` tokens before the query at [B,T]."""
    return queries[:, :, None] - keys[:, None, :] < window
