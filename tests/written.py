"""Three small tasks that a two-layer decoder learns to answer and to write, and runs that write rows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from support import WINDOW, Done, run, weights

from jaxcl.core import journal
from jaxcl.core.checkpoint import Store
from jaxcl.core.types import Method
from jaxcl.data.encode import Example, encode
from jaxcl.data.stage import Stage

EOS, TARGETS = 31, 3
SINGLE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


class Echo:
    """Stage s: a letter x out of eight of its own, two or three times; the answer is one of two labels of its own."""

    def __init__(self, stage: int, n: int = 32):
        self.name, self.stage, self.n = f"s{stage}", stage, n

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        x = i % 8
        return [8 * self.stage + x] * (2 + i // 8 % 2), [24 + 2 * self.stage + x % 2, EOS]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        return encode(*self.pair(i), WINDOW, TARGETS, row=i)

    def label(self, i: int) -> str:
        return f"{self.name}-{i % 2}"

    def record(self, i: int) -> dict[str, Any]:
        return {"id": self.id(i)}

    def id(self, i: int) -> str:
        return f"{self.name}/{i}"


def echoes(n: int = 3, rows: int = 32) -> list[Stage]:
    return [Stage(f"s{s}", Echo(s, rows)) for s in range(n)]


def learned(method: Method, out: Path, *others: Method, n: int = 2, epochs: float = 32, **kw: Any) -> Done:
    """Stages long enough that the model answers and writes them well."""
    return run([method, *others], out, stages=echoes(n), tx=optax.adam(1e-2), epochs=epochs, **kw)


def saved(out: Path, entry: str) -> dict[str, np.ndarray]:
    """All arrays of a journal entry."""
    source = journal.flatten(weights(), "params")
    arrays = Store(out / "checkpoints").load(entry, lambda *_: SINGLE, source)
    return {k: np.asarray(v) for k, v in arrays.items()}


def parameters(out: Path, entry: str) -> dict[str, np.ndarray]:
    return journal.nest(saved(out, entry), "params")


def greedy(apply, spec, params, prompt: list[int], steps: int, allowed: int, stop: int = EOS) -> list[int]:
    """Token by token among the first ``allowed`` ones, the whole sequence again each time."""
    tokens = np.zeros((1, WINDOW + TARGETS), np.int32)
    tokens[0, : len(prompt)], made = prompt, []
    for at in range(len(prompt), len(prompt) + steps):
        place = np.arange(tokens.shape[1], dtype=np.int32)[None]
        batch = {"tokens": tokens, "segments": (place < at).astype(np.int32), "positions": place}
        hidden = np.asarray(apply(spec, params, batch).hidden, np.float64)[0, at - 1]
        made.append(int(np.argmax(params["embed/kernel"][:allowed] @ hidden)))
        tokens[0, at] = made[-1]
        if made[-1] == stop:
            break
    return made
