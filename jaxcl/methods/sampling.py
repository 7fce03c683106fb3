"""Texts that the model writes between two phases, in batches of the run's own size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Params, World
from jaxcl.data.pseudo import padded
from jaxcl.surgery.vocabulary import opened

Fields = Mapping[str, int]


class How(NamedTuple):
    """How to write: at most ``most`` tokens, up to one of ``stops``; the rest as in `jaxcl.models.generate.generate`.
    say: a closed row of the vocabulary that may be said, see `jaxcl.surgery.vocabulary`; None: none."""

    most: int
    stops: tuple[int, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    say: int | None = None


def write(
    world: World, prompts: Sequence[Sequence[int]], width: int, rows: int, how: How, key: jax.Array, more: Fields
) -> list[tuple[list[int], bool]]:
    """(ids that continue the prompt, without the stop; whether it came to one) of each prompt of at most ``width`` ids.

    ``rows`` prompts at a time: one compilation for all calls of one ``width`` and ``how``. more: further fields of a
    row that the model reads (``task_id``), the same for all.
    """
    written: list[tuple[list[int], bool]] = []
    for at in range(0, len(prompts), rows):
        some = prompts[at : at + rows]
        lengths = [len(p) for p in some] + [0] * (rows - len(some))
        block = padded([*some, *[()] * (rows - len(some))], width, fill=0)
        batch = {"tokens": block, "lengths": np.array(lengths, np.int32)}
        batch |= {name: np.full(rows, value, np.int32) for name, value in more.items()}
        made, count = map(host, world.tools.call(_writer(how), batch, jax.random.fold_in(key, at)))
        written += [(ids[:n].tolist(), bool(n < how.most)) for ids, n in zip(made, count, strict=True)][: len(some)]
    return written


@functools.cache
def _writer(how: How) -> Callable[[Any, Params, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """One function per setting, for it is the key under which the tools keep what they compiled."""

    def writer(forward: Any, train: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        params: Mapping[str, Any] = {**forward.frozen, **train}
        said = dict(params) if how.say is None else opened(dict(params), how.say)
        return forward.generate(
            said, batch["tokens"], batch["lengths"], max_new=how.most, stop_ids=how.stops, key=key, top_p=how.top_p,
            temperature=how.temperature, top_k=how.top_k, repetition_penalty=how.repetition_penalty,
            batch={k: v for k, v in batch.items() if k not in ("tokens", "lengths")},
        )  # fmt: skip

    return writer
