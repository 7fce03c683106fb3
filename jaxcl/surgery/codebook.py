"""A codebook of edits: keys with a value, a radius and a label each. How it is searched and how it grows.

Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031, section 3. Pure functions on a dict of arrays of fixed capacity C,
of which the first n rows are in use. I: width of a key, O: of a value, Y: longest label, B: rows asked for at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Codebook = dict[str, jax.Array]
"""keys f32[C,I], values f32[C,O], eps f32[C] (radii), label i32[C,Y] (token ids, zeros behind), label_len i32[C],
n i32[] (rows in use)."""

ADD, EXPAND, SPLIT = 0, 1, 2
GAP = 1e-5
"""How far a split keeps the old ball from the new one."""


class Rules(NamedTuple):
    """The paper's choices. eps_init: radius of a new ball. moving_average: an expanded ball's key moves halfway to the
    query. shrink: a split never makes the old ball larger (as published it may). slack: an expanded radius reaches this
    much, relatively, beyond its query, which would else lie on the very edge, a matter of rounding."""

    eps_init: float = 1.0
    moving_average: bool = False
    shrink: bool = False
    slack: float = 1e-6


def empty(capacity: int, inputs: int, outputs: int, label: int) -> Codebook:
    """A codebook without a key in use."""
    return {
        "keys": jnp.zeros((capacity, inputs), jnp.float32),
        "values": jnp.zeros((capacity, outputs), jnp.float32),
        "eps": jnp.zeros(capacity, jnp.float32),
        "label": jnp.zeros((capacity, label), jnp.int32),
        "label_len": jnp.zeros(capacity, jnp.int32),
        "n": jnp.zeros((), jnp.int32),
    }


def grown(book: Codebook, rows: int, label: int) -> Codebook:
    """The same with its capacity doubled until ``rows`` more keys fit, and room for labels of ``label`` tokens."""
    capacity, width = book["label"].shape
    while capacity < int(book["n"]) + rows:
        capacity *= 2
    more = capacity - len(book["eps"])

    def padded(name: str, x: jax.Array) -> jax.Array:
        beside = max(0, label - width) if name == "label" else 0
        return jnp.pad(x, ((0, more), (0, beside))[: x.ndim]) if x.ndim else x

    return {name: padded(name, x) for name, x in book.items()}


def nearest(book: Codebook, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(row i32[B], distance f32[B]) of the key nearest to each query f32[B,I]; distance inf without any key.

    Of equally near keys the newest counts. Differences are taken exactly, key by key: |q|^2 - 2qk + |k|^2 would
    cancel just where it matters, at a query that is a key.
    """
    capacity = len(book["eps"])
    square = jnp.sum(jnp.square(query[:, None, :] - book["keys"]), axis=-1)
    square = jnp.where(jnp.arange(capacity) < book["n"], square, jnp.inf)
    row = capacity - 1 - jnp.argmin(square[:, ::-1], axis=-1).astype(jnp.int32)
    return row, jnp.sqrt(jnp.take_along_axis(square, row[:, None], axis=-1)[:, 0])


def lookup(book: Codebook, query: jax.Array) -> jax.Array:
    """i32[B]: the row whose ball holds each query f32[B,I], -1 where the nearest key's ball does not."""
    row, distance = nearest(book, query)
    return jnp.where(distance <= book["eps"][row], row, -1)


def edited(
    book: Codebook, query: jax.Array, value: jax.Array, label: jax.Array, label_len: jax.Array, rules: Rules
) -> tuple[Codebook, jax.Array, jax.Array]:
    """(codebook, the row whose value is now in use, which rule: ADD, EXPAND or SPLIT) after an edit.

    query f32[I], label i32[Y] with label_len i32[] ids. ADD: nothing within eps_init of a ball, a new one for ``value``
    f32[O]. EXPAND: the nearest ball has this label, it grows to the query. SPLIT: it has another, both halve the way
    between them. The codebook must have room for one more key. Labels are compared id by id.
    """
    rows, distances = nearest(book, query[None])
    j, d, n = rows[0], distances[0], book["n"]
    near = d <= rules.eps_init + book["eps"][j]
    same = (book["label_len"][j] == label_len) & jnp.all(book["label"][j] == label)

    def with_key(eps: jax.Array) -> Codebook:
        new = {"keys": query, "values": value, "eps": eps, "label": label, "label_len": label_len}
        return {**{name: book[name].at[n].set(x) for name, x in new.items()}, "n": n + 1}

    def add() -> Codebook:
        return with_key(jnp.float32(rules.eps_init))

    def expand() -> Codebook:
        wider = d > book["eps"][j]
        eps = jnp.where(wider, d * (1 + rules.slack), book["eps"][j])
        moved = (book["keys"][j] + query) / 2 if rules.moving_average else book["keys"][j]
        keys = book["keys"].at[j].set(jnp.where(wider, moved, book["keys"][j]))
        return {**book, "keys": keys, "eps": book["eps"].at[j].set(eps)}

    def split() -> Codebook:
        old = d / 2 - GAP
        new = with_key(d / 2)
        return {**new, "eps": new["eps"].at[j].set(jnp.minimum(old, book["eps"][j]) if rules.shrink else old)}

    rule = jnp.where(near, jnp.where(same, EXPAND, SPLIT), ADD)
    return jax.lax.switch(rule, [add, expand, split]), jnp.where(rule == EXPAND, j, n), rule
