"""Held-out text, both ways to count it, from one pass: bits per byte for people, nats per token for differences.

Bits per byte do not depend on the tokenizer, so languages and models can be compared; forgetting and transfer of
continual pre-training are differences of nats (`jaxcl.metrics.nats`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.evaluate.base import Eval, Item, Progress, shared
from jaxcl.evaluate.nll import UNITS, text_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


def held_out(
    eval_id: str,
    documents: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    batch_size: int = 16,
    role: str = "task",
) -> list[Eval]:
    """[``eval_id`` in bits per byte, ``eval_id/nll`` in nats per token] over ``text`` rows, one pass for both.

    RequestError: see `evaluate.nll.text_nll`.
    """
    nll = text_nll(f"{eval_id}/nll", documents, tokenizer, window=window, batch_size=batch_size, role=role)
    sizes = [UNITS["bits_per_byte"](row["text"]) for row in documents]
    once = shared(nll.run)

    def bits(view: Any, progress: Progress) -> list[Item]:
        nats = [item["parts"][0] for item in once(view, progress)]
        return [
            {"id": row["id"], "prediction": None, "score": amount / size, "parts": [amount, size]}
            for row, amount, size in zip(documents, nats, sizes)
        ]

    first = dataclasses.replace(nll, id=eval_id, metric="bits_per_byte", run=bits)
    return [first, dataclasses.replace(nll, run=once)]
