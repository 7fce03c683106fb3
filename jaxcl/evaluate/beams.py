"""Beam search among given answers: the most likely texts of a list after a prompt, found along its trie.

The prompt is run once and cached. At every depth one block holds all live beginnings of a row, each in a segment of its
own that starts with the prompt's last token again, as in `jaxcl.evaluate.ranking`; answers are short, so running their
beginnings anew costs less than moving caches. A score is the exact sum of the tokens' log-probabilities, end mark
included, under the whole vocabulary. Suffix letters: B rows, W beams, C children of a trie's node, N tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Params
from jaxcl.evaluate.base import bucket, filled
from jaxcl.models.cache import Cache, extend, prefill

Node = dict[int, Any]
"""{token: the node after it, or the name of the answer that it ends}"""


class Beam(NamedTuple):
    """score: sum of log-probabilities. at: a node, or the name of a finished answer."""

    score: float
    tokens: tuple[int, ...]
    at: Any

    @property
    def live(self) -> bool:
        return isinstance(self.at, dict)


def trie(answers: Iterable[tuple[str, Sequence[int]]]) -> Node:
    """The trie of (name, ids with an end mark)."""
    root: Node = {}
    for name, ids in answers:
        node = root
        for token in ids[:-1]:
            node = node.setdefault(token, {})
        node[ids[-1]] = name
    return root


def widest(node: Node) -> int:
    """Children of the node that has most."""
    return max(len(node), *(widest(child) for child in node.values() if isinstance(child, dict)), 1)


def prompt_cache(apply: Any, head: Any, spec: Any, params: Params, prompt: Batch) -> Cache:
    """The cache of prompts i32[B,T]."""
    return prefill(apply, spec, params, prompt, prompt["tokens"].shape[1]).cache


def next_scores(
    apply: Any, head: Any, spec: Any, params: Params, cache: Cache, block: Batch, ends: jax.Array, children: jax.Array
) -> jax.Array:
    """f32[B,W,C]: log-probability of each child i32[B,W,C] after the beginning that ends at ``ends`` i32[B,W]."""
    hidden = extend(apply, spec, params, block, cache, write=False).hidden
    logits = head(spec, params, hidden, ends).astype(jnp.float32)
    found = jnp.take_along_axis(logits, children, axis=-1)
    return found - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def search(
    view: Any, prompts: Sequence[Sequence[int]], size: int, root: Node, *, beams: int, batch_size: int, width: int
) -> list[list[tuple[str, float]]]:
    """For each of at most ``batch_size`` prompts its best (name, score), best first, at most ``beams``.

    size: tokens to which prompts are padded; width: children to which nodes are padded (`widest`). At every depth the
    best ``beams`` of finished answers and live beginnings stay; where they are as many as the answers, nothing is lost.
    """
    rows = [list(prompt) for prompt in prompts]
    cache = view.call(prompt_cache, _prompts(rows, size, batch_size))
    states = [[Beam(0.0, (), root)] for _ in rows]
    while any(beam.live for state in states for beam in state):
        block, ends, children = _blocks(rows, states, beams, width, batch_size)
        scores = host(view.call(next_scores, cache, block, ends, children)).astype(np.float64)
        states = [_grown(state, found, beams) for state, found in zip(states, scores)]
    return [[(beam.at, beam.score) for beam in state] for state in states]


def _grown(state: Sequence[Beam], scores: np.ndarray, beams: int) -> list[Beam]:
    """The best of what was finished and of all children; on a tie the earlier one."""
    grown = [beam for beam in state if not beam.live]
    for beam, found in zip([beam for beam in state if beam.live], scores):
        for (token, child), score in zip(beam.at.items(), found):
            grown.append(Beam(beam.score + float(score), (*beam.tokens, token), child))
    return sorted(grown, key=lambda beam: -beam.score)[:beams]


def _prompts(rows: Sequence[list[int]], size: int, batch_size: int) -> Batch:
    lengths = np.array([len(ids) for ids in rows])
    tokens = filled([np.pad(np.array(ids, np.int32), (0, size - len(ids))) for ids in rows], batch_size)
    places = np.broadcast_to(np.arange(size, dtype=np.int32), tokens.shape)
    inside = places < filled(list(lengths), batch_size)[:, None]
    return {"tokens": tokens, "segments": inside.astype(np.int32), "positions": places * inside}


def _blocks(
    rows: Sequence[list[int]], states: Sequence[Sequence[Beam]], beams: int, width: int, batch_size: int
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """The block of all live beginnings, where each of them ends, and the children asked for."""
    live = [[beam for beam in state if beam.live] for state in states]
    size = bucket(max(sum(1 + len(beam.tokens) for beam in some) for some in live), 1 << 30)
    names = ("tokens", "segments", "positions")
    block = {name: np.zeros((len(rows), size), np.int32) for name in names}
    ends, children = np.zeros((len(rows), beams), np.int32), np.zeros((len(rows), beams, width), np.int32)
    for r, (ids, some) in enumerate(zip(rows, live)):
        at = 0
        for w, beam in enumerate(some):
            inside = slice(at, at + 1 + len(beam.tokens))
            block["tokens"][r, inside] = [ids[-1], *beam.tokens]
            block["segments"][r, inside] = w + 1
            block["positions"][r, inside] = len(ids) - 1 + np.arange(1 + len(beam.tokens))
            ends[r, w], at = inside.stop - 1, inside.stop
            children[r, w, : len(beam.at)] = list(beam.at)
    whole = {name: filled(list(block[name]), batch_size) for name in names}
    return whole, filled(list(ends), batch_size), filled(list(children), batch_size)
