"""A small decoder over bytes and its plain forward: what the tests of written answers compare with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jaxcl.core.view import View
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny

WIDTH = 96
Logits = Callable[[list[int]], np.ndarray]


class Bytes:
    """One token a byte; 256 ends a sequence."""

    eos_id, pad_id, vocab_size = 256, 0, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def make_view(layers: int = 1) -> View:
    """Initial weights made larger, so that answers differ from row to row."""
    model = decoder(tiny(vocab=257, layers=layers, context=WIDTH))
    params = model.init(model.spec, jax.random.key(1))
    params = {k: v * 6 if "embed" in k else v * 5 if "attn/" in k else v for k, v in params.items()}
    return View(model).at(model.spec, params, {}, {}, None)


def make_logits(view: View) -> Logits:
    """logits(ids) -> f64[len(ids), V] by one plain forward of a fixed width, without cache or targets."""

    @jax.jit
    def run(params, batch):
        hidden = view.model.apply(view.spec, params, batch).hidden
        return view.model.head(view.spec, params, hidden, np.arange(WIDTH)[None])

    def of(ids):
        pad = (0, WIDTH - len(ids))
        batch = {
            "tokens": np.pad(np.int32(ids), pad)[None],
            "segments": np.pad(np.ones(len(ids), np.int32), pad)[None],
            "positions": np.pad(np.arange(len(ids), dtype=np.int32), pad)[None],
        }
        return np.asarray(run(view.params, batch), np.float64)[0, : len(ids)]

    return of


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def greedy(logits: Logits, prompt: list[int], most: int) -> list[int]:
    written: list[int] = []
    while len(written) < most:
        token = int(np.argmax(logits(prompt + written)[-1]))
        if token == Bytes.eos_id:
            break
        written.append(token)
    return written


def rows(n: int) -> list[dict]:
    """The first is short, the others are of one length bucket."""
    return [
        {
            "task": "t",
            "id": str(i),
            "instruction": f"Continue {i}.\n",
            "input": "ab" * (i + 9 if i else 0),
            "target": "?" * 7,
        }
        for i in range(n)
    ]


def prompt_of(row: dict) -> list[int]:
    return list(f"{row['instruction']}{row['input']}\nAnswer:".encode())
