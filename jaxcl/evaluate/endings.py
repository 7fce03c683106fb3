"""How likely a model finds each of several endings after a prompt: what ranking, choice, probes and preference ask.

What all prompts of an evaluation begin with is run once a batch and its cache given to every row. Then the rest of each
prompt is run, whose last token predicts the first token of every ending; then the endings side by side in a block, each
in a segment of its own so that none sees another, and without its last token, which predicts nothing. Many endings
are cut into blocks that run one after another. One device call a batch; only the sums come back.
Suffix letters: B rows, P tokens of the common beginning, S of the rest, L endings, C blocks of N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Params
from jaxcl.evaluate.base import Progress, filled
from jaxcl.models.cache import Cache, extend, prefill, spread

BLOCK = 32
"""Tokens of a row's block of endings, more where one ending is longer."""
LOGITS = 512
"""Positions whose logits exist at the same time."""
SERVED = 16
"""Batches that one shape serves: to compile another takes longer than they take with some padding more."""
CELLS = ("tokens", "targets", "segments", "positions")

Ids = Sequence[int] | np.ndarray


def endings_nll(
    view: Any, prompts: Sequence[Ids], endings: Sequence[Sequence[Ids]], batch_size: int, progress: Progress
) -> list[np.ndarray]:
    """For each row f32[2,L]: the nats of each ending, summed over its tokens, given the prompt; and how many of its
    tokens were not the most likely one. In the rows' order.

    Prompts and endings hold at least one token each. Batches are of rows whose prompts are of about one length. Where a
    method wraps the model no beginning is shared, because the method may look at the prompt as a whole.
    """
    begin = 0 if getattr(view, "wrapped", False) else common(prompts)
    blocks = [cut(each) for each in endings]
    tokens = max(sum(len(e) - 1 for e in part) for row in blocks for part in row)
    shape = (max(map(len, endings)), max(map(len, blocks)), size_of(tokens, 8))
    found: list[np.ndarray] = [np.zeros((2, 0))] * len(prompts)
    done = 0
    for longest, members in by_length([len(p) for p in prompts], batch_size):
        rest = size_of(longest - begin, 16)
        prompt = stacked([prompt_arrays(prompts[i], begin, rest) for i in members], batch_size)
        block = stacked([block_arrays(len(prompts[i]), blocks[i], *shape) for i in members], batch_size)
        for i, row in zip(members, host(view.call(ending_nll, prompt, block))):
            found[i] = row[:, : len(endings[i])]
        done += len(members)
        progress(done, len(prompts))
    return found


def ending_nll(apply: Any, head: Any, spec: Any, params: Params, prompt: Batch, block: Batch) -> jax.Array:
    """f32[B,2,L], see `endings_nll`, from what `prompt_arrays` and `block_arrays` make; one compilation per shape."""
    hidden, last, cache = run_prompt(apply, spec, params, prompt)
    found = predicted(head(spec, params, hidden, last[:, None]), block["first"][:, None])
    if not block["tokens"].shape[2]:
        return found
    cells = {name: jnp.moveaxis(block[name], 1, 0) for name in CELLS}

    def add(number: Any, found: jax.Array) -> jax.Array:
        part = {name: cell[number] for name, cell in cells.items()}
        return found + block_nll(apply, head, spec, params, part, cache, found.shape[2])

    if len(cells["tokens"]) == 1:
        return add(0, found)
    used = jnp.max(jnp.where(cells["segments"] > 0, jnp.arange(len(cells["tokens"]))[:, None, None] + 1, 0))
    return jax.lax.fori_loop(0, used, add, found)


def predicted(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[B,2,K]: nll of ``tokens`` i32[B,N,K / N], and 1 where another is more likely, under logits f32[B,N,V]."""
    picked = jnp.take_along_axis(logits, tokens, axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked
    missed = (picked < logits.max(axis=-1, keepdims=True)).astype(nll.dtype)
    return jnp.stack([nll, missed], axis=1).reshape(len(tokens), 2, -1)


def run_prompt(apply: Any, spec: Any, params: Params, prompt: Batch) -> tuple[jax.Array, jax.Array, Cache]:
    """(hidden [B,S,D] of the prompts after their common beginning, index i32[B] of their last token in it, cache)."""
    rows, begin = prompt["begin"].shape
    rest = prompt["tokens"].shape[1]
    shared = prompt["begins"][:1]  # all rows begin alike
    positions = shared[:, None] + jnp.arange(rest)
    positions = jnp.broadcast_to(positions, (rows, rest))
    batch = {
        "tokens": prompt["tokens"],
        "positions": positions,
        "segments": (positions < prompt["length"][:, None]).astype(jnp.int32),
    }
    if begin:
        places = jnp.arange(begin)[None]
        first = {"tokens": prompt["begin"][:1], "positions": places, "segments": (places < shared).astype(jnp.int32)}
        cache = spread(prefill(apply, spec, params, first, begin + rest).cache, rows)
        out = extend(apply, spec, params, batch, cache, write=True)
    else:
        out = prefill(apply, spec, params, batch, rest)
    return out.hidden, prompt["length"] - shared - 1, out.cache


def block_nll(
    apply: Any, head: Any, spec: Any, params: Params, part: Batch, cache: Cache, endings: int
) -> jax.Array:
    """f32[B,2,L]: what the tokens [B,N] of one block add for their endings; segment l + 1 is ending l, 0 is padding."""
    batch = {name: part[name] for name in ("tokens", "segments", "positions")}
    hidden = extend(apply, spec, params, batch, cache, write=False).hidden
    rows, size = part["tokens"].shape
    step = min(size, max(1, LOGITS // rows))
    parts = -(-size // step)

    def some(at: jax.Array) -> jax.Array:
        logits = head(spec, params, hidden, jnp.broadcast_to(at, (rows, step)))
        return predicted(logits, part["targets"][:, at, None])

    at = jnp.minimum(jnp.arange(parts * step), size - 1).reshape(parts, step)
    found = jnp.moveaxis(jax.lax.map(some, at), 0, 2).reshape(rows, 2, -1)[:, :, :size]
    sums = jnp.zeros((rows, 2, endings + 1))
    which = jnp.arange(rows)[:, None], slice(None), part["segments"]
    return sums.at[which].add(found.swapaxes(1, 2))[:, :, 1:]


def prompt_arrays(ids: Ids, begin: int, rest: int) -> Batch:
    """One row: ``begin`` tokens that all rows share, padded to P, the others padded to S = ``rest``, both lengths."""
    start, end = np.zeros(size_of(begin, 8), np.int32), np.zeros(rest, np.int32)
    start[:begin], end[: len(ids) - begin] = ids[:begin], ids[begin:]
    return {"begin": start, "begins": np.int32(begin), "tokens": end, "length": np.int32(len(ids))}


def block_arrays(length: int, blocks: Sequence[Sequence[Ids]], most: int, count: int, size: int) -> Batch:
    """One row after a prompt of ``length`` tokens. first [L]: the endings' first tokens, L = ``most``. Of the blocks'
    tokens [C,N]: themselves, what follows each, its segment (the number of its ending from 1, 0: padding) and position.
    """
    first = np.zeros(most, np.int32)
    cells = {name: np.zeros((count, size), np.int32) for name in CELLS}
    number = 0
    for block, part in enumerate(blocks):
        at = 0
        for ending in part:
            first[number] = ending[0]
            inside = (block, slice(at, at + len(ending) - 1))
            number, at = number + 1, inside[1].stop
            values = (ending[:-1], ending[1:], number, length + np.arange(len(ending) - 1))
            for name, value in zip(CELLS, values):
                cells[name][inside] = value
    return {"first": first, **cells}


def common(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with, at most one less than the shortest has; 0 for a single prompt."""
    first, *others = prompts
    most = min(map(len, prompts)) - 1
    for other in others:
        unlike = np.flatnonzero(np.asarray(first[:most]) != np.asarray(other[:most]))
        most = int(unlike[0]) if len(unlike) else most
    return most if others else 0


def size_of(length: int, least: int) -> int:
    """A size that holds ``length``, four to a doubling and at most a quarter too large: few shapes, little waste."""
    if length <= 0:
        return 0
    step = max(least, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """(a length that holds them, rows) of one batch after another, the shortest first; `SERVED` batches share a length.

    Only the last batch may be short.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    alike = batch_size * SERVED
    for at in range(0, len(order), batch_size):
        longest = order[at - at % alike :][:alike][-1]
        yield lengths[longest], order[at : at + batch_size]


def cut(endings: Sequence[Ids]) -> list[list[Ids]]:
    """The endings of each block, in order: `BLOCK` tokens at most, without the last of each, or a single ending."""
    parts: list[list[Ids]] = [[]]
    room = BLOCK
    for ending in endings:
        if parts[-1] and len(ending) - 1 > room:
            parts.append([])
            room = BLOCK
        parts[-1].append(ending)
        room -= len(ending) - 1
    return parts


def stacked(rows: Sequence[Batch], batch_size: int) -> Batch:
    """Arrays of single rows as arrays [B, ...], filled up with the first row."""
    return {name: filled([row[name] for row in rows], batch_size) for name in rows[0]}
