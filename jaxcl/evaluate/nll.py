"""How well a model predicts held-out text: nats per token, perplexity, bits per byte, or next-token accuracy.

Windowing: a document is preceded by the end-of-sequence token and cut into windows of ``window`` tokens, each
of which begins with the last token of the one before. So every token of a document is predicted exactly once,
from the tokens before it in its window; the first token is scored, an end mark is not. The last window is as long as
what is left; with ``fill_last`` it is a full one that begins further back, and only its new tokens are scored: this is
what lm-evaluation-harness does, whose ``max_length`` is ``window`` - 1. A document is one item, and the eval's number
weighs documents by their tokens (bits per byte: by their bytes), never equally: card metrics/rouge-ppl.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Params
from jaxcl.data.encode import encode_text
from jaxcl.data.pipeline import stack
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, check_items

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

METRICS = {  # higher is better, range, how documents are pooled
    "nll": (False, (0.0, math.inf), "ratio"),
    "perplexity": (False, (1.0, math.inf), "exp_ratio"),
    "bits_per_byte": (False, (0.0, math.inf), "ratio"),
    "word_perplexity": (False, (1.0, math.inf), "exp_ratio"),
    "byte_perplexity": (False, (1.0, math.inf), "exp_ratio"),
    "accuracy": (True, (0.0, 1.0), "ratio"),
}
UNITS: dict[str, Callable[[str], float]] = {  # what nats are divided by where it is not tokens
    "bits_per_byte": lambda text: len(text.encode()) * math.log(2),
    "byte_perplexity": lambda text: len(text.encode()),
    "word_perplexity": lambda text: len(re.split(r"\s+", text)),
}
CHUNK = 64
"""Positions whose logits exist at a time when the most likely next token is looked up."""


def text_nll(
    eval_id: str,
    documents: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    batch_size: int = 16,
    metric: str = "nll",
    role: str = "task",
    fill_last: bool = False,
) -> Eval:
    """Held-out ``text`` rows scored by ``metric``: 'nll' (nats per token), 'perplexity' (its exponential),
    'bits_per_byte' (of the UTF-8 text), 'word_perplexity' and 'byte_perplexity' (exponential of nats per word between
    white space, per byte, as lm-evaluation-harness counts them) or 'accuracy' (share of tokens that are the most likely
    one). RequestError: no rows, an empty text, another metric, a window below two tokens.
    """
    check_items(eval_id, documents, batch_size)
    if metric not in METRICS:
        raise unknown("metric of held-out text", metric, METRICS)
    if window < 2:
        raise RequestError(f"eval {eval_id!r}: window={window}; accepted: at least 2 tokens")
    for row in documents:
        if not row["text"]:
            raise RequestError(f"eval {eval_id!r}: row {row['id']!r} has no text")
    better, bounds, pool = METRICS[metric]
    run = _Text(documents, tokenizer, window, batch_size, metric, fill_last)
    return Eval(
        eval_id, metric, len(documents), run, higher_is_better=better, range=bounds, role=role, pool=pool
    )


def window_ids(ids: Sequence[int], start: int, window: int) -> list[list[int]]:
    """``ids`` after the token ``start``, in windows that overlap by one token."""
    whole = [start, *ids]
    return [whole[at : at + window] for at in range(0, len(whole) - 1, window - 1)]


def windows(ids: Sequence[int], start: int, window: int) -> list[tuple[list[int], int]]:
    """`window_ids`, each with how many of its tokens are only context."""
    return [(part, 1) for part in window_ids(ids, start, window)]


def filled_windows(ids: Sequence[int], start: int, window: int) -> list[tuple[list[int], int]]:
    """`windows` with the last one filled up from the front."""
    found = windows(ids, start, window)
    if len(found) > 1:
        found[-1] = ([start, *ids][-window:], window - len(found[-1][0]) + 1)
    return found


def start_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing precedes: what the model's sequences begin with, else the end mark."""
    return (getattr(tokenizer, "start", ()) or (tokenizer.eos_id,))[-1]


def token_scores(apply: Any, head: Any, spec: Any, params: Params, batch: Batch) -> jax.Array:
    """f32[B,T]: nll of each token given those before it."""
    return apply(spec, params, batch).nll


def token_hits(apply: Any, head: Any, spec: Any, params: Params, batch: Batch) -> jax.Array:
    """f32[B,T]: 1 where token t is the most likely one after the tokens before it, else 0."""
    hidden, tokens = apply(spec, params, batch).hidden, batch["tokens"]
    rows, length = tokens.shape
    parts = -(-length // CHUNK)
    at = jnp.minimum(jnp.arange(parts * CHUNK), length - 1).reshape(parts, CHUNK)
    best = functools.partial(_best, head, spec, params, hidden)
    guess = jax.lax.map(best, at).swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jnp.pad((guess[:, :-1] == tokens[:, 1:]).astype(jnp.float32), ((0, 0), (1, 0)))


def _best(head: Any, spec: Any, params: Params, hidden: jax.Array, at: jax.Array) -> jax.Array:
    everywhere = jnp.broadcast_to(at, (hidden.shape[0], len(at)))
    return jnp.argmax(head(spec, params, hidden, everywhere), axis=-1)


class _Text:
    """The evaluator: all windows have one shape, so it compiles once."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        window: int,
        batch_size: int,
        metric: str,
        fill_last: bool,
    ) -> None:
        self.rows, self.batch_size, self.metric = list(rows), batch_size, metric
        self.window, self.tokenizer, self.fill_last = window, tokenizer, fill_last

    @functools.cached_property
    def windows(self) -> list[tuple[int, dict[str, Any]]]:
        """(document, example) of every window."""
        return [(i, example) for i, row in enumerate(self.rows) for example in self._windows(i, row["text"])]

    def _windows(self, i: int, text: str) -> Iterator[dict[str, Any]]:
        cut = filled_windows if self.fill_last else windows
        for part, context in cut(self.tokenizer.encode(text), start_id(self.tokenizer), self.window):
            example = encode_text(part, self.window, pad=self.tokenizer.pad_id, row=i)
            example["weight"][:context] = 0.0
            yield example

    def __call__(self, view: Any, progress: Progress) -> list[Item]:
        fn = token_hits if self.metric == "accuracy" else token_scores
        sums, counts = np.zeros(len(self.rows)), np.zeros(len(self.rows))
        for at in range(0, len(self.windows), self.batch_size):
            part = self.windows[at : at + self.batch_size]
            examples = [example for _, example in part]
            batch = stack(examples + [examples[0]] * (self.batch_size - len(part)))
            values = host(view.call(fn, batch)).astype(np.float64)
            for (i, example), row in zip(part, values):
                sums[i] += row @ example["weight"]
                counts[i] += example["weight"].sum()
            progress(part[-1][0] + 1, len(self.rows))
        if self.metric in UNITS:
            counts = np.array([UNITS[self.metric](row["text"]) for row in self.rows], np.float64)
        return [self._item(row["id"], float(s), float(c)) for row, s, c in zip(self.rows, sums, counts)]

    def _item(self, row: str, amount: float, count: float) -> Item:
        own = math.exp(amount / count) if METRICS[self.metric][2] == "exp_ratio" else amount / count
        return {"id": row, "prediction": None, "score": own, "parts": [amount, count]}
