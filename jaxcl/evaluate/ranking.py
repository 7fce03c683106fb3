"""Label ranking: the answer is the label that the model finds most likely after the prompt.

The prompt is run once and cached, with what a router decided at its last token; then one block holds every label in
a segment of its own, begun by that token again, so no label sees another. Suffix letters: B rows, T prompt tokens,
N tokens of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcl.core.types import Batch, Params
from jaxcl.data.encode import check_frames, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, nearest, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, accepted, bucket, check_items, filled, grouped
from jaxcl.models.cache import extend, prefill

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

BLOCK = 32
"""Blocks of labels are padded to a multiple of this, so that tasks with similar label sets share a shape."""


def label_ranking(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    template: Template | None = None,
    batch_size: int = 16,
    normalise: str = "sum",
    role: str = "task",
) -> Eval:
    """Accuracy of the best of a row's ``labels``; on a tie the first label wins.

    A label's score is the log-probability of its tokens and the end-of-sequence token, summed ('sum') or per
    token ('mean'). Prompts are shortened as in training, to ``window`` less the longest label. RequestError:
    no rows, a row without labels, a target that is no label, labels that do not fit.
    """
    check_items(eval_id, rows, batch_size)
    if normalise not in ("sum", "mean"):
        raise unknown("normalisation", normalise, ("sum", "mean"))
    for row in rows:
        if not row.get("labels"):
            raise RequestError(f"eval {eval_id!r}: row {row['id']!r} has no labels to rank")
        if not set(accepted(row)) & set(row["labels"]):
            raise RequestError(
                f"eval {eval_id!r}: row {row['id']!r} has the target {row['target']!r}, not one of its "
                f"labels; {nearest(row['target'], row['labels'])}"
            )
    ranking = _Ranking(rows, tokenizer, template or Template(), window, batch_size, normalise)
    chance = sum(1 / len(row["labels"]) for row in rows) / len(rows)
    return Eval(eval_id, "accuracy", len(rows), ranking, role=role, chance=chance)


def label_nll(apply: Any, head: Any, spec: Any, params: Params, prompt: Batch, block: Batch) -> jax.Array:
    """f32[B,N]: nll of each label token in the block, given the prompt and its label's earlier tokens."""
    cache = prefill(apply, spec, params, prompt, prompt["tokens"].shape[1]).cache
    return extend(apply, spec, params, block, cache, write=False).nll


def label_block(last: int, start: int, labels: Sequence[Sequence[int]], size: int) -> Batch:
    """The block of one row, arrays [N] with N = ``size``.

    Label l is ``last`` (the prompt's last token, at position ``start``) and its own tokens, in segment l + 1.
    ``targets_at[j]`` is j where token j belongs to a label, else 0, so nll comes back token by token.
    """
    block = {name: np.zeros(size, np.int32) for name in ("tokens", "segments", "positions", "targets_at")}
    at = 0
    for number, label in enumerate(labels):
        inside = slice(at, at + 1 + len(label))
        block["tokens"][inside] = [last, *label]
        block["segments"][inside] = number + 1
        block["positions"][inside] = start + np.arange(1 + len(label))
        block["targets_at"][at + 1 : inside.stop] = np.arange(at + 1, inside.stop)
        at = inside.stop
    return block


class _Ranking:
    """The evaluator: labels are encoded at once, prompts at the first run; both are kept."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        template: Template,
        window: int,
        batch_size: int,
        normalise: str,
    ) -> None:
        self.rows, self.tokenizer, self.template = list(rows), tokenizer, template
        self.window, self.batch_size, self.normalise = window, batch_size, normalise
        known = {label for row in rows for label in row["labels"]}
        ids = {label: target_ids({"target": label}, template, tokenizer) for label in known}
        self.labels = [[ids[label] for label in row["labels"]] for row in rows]
        self.rooms = [window - max(len(label) for label in labels) for labels in self.labels]
        check_frames(rows, self.rooms, template, tokenizer)
        self.prompts: list[list[int]] = []

    def __call__(self, view: Any, progress: Progress) -> list[Item]:
        if not self.prompts:
            pairs = zip(self.rows, self.rooms)
            self.prompts = [fit_prompt(row, self.template, self.tokenizer, room) for row, room in pairs]
        items: list[Item] = [{}] * len(self.rows)
        sizes = [bucket(len(p), self.window) for p in self.prompts]
        tokens = max(sum(1 + len(label) for label in labels) for labels in self.labels)
        block_size, done = -(-tokens // BLOCK) * BLOCK, 0
        for size, members in grouped(sizes, self.batch_size):
            prompt, block = self._batch(members, size, block_size)
            nll = np.asarray(view.call(label_nll, prompt, block))
            for i, row_nll, segments in zip(members, nll, block["segments"]):
                items[i] = self._item(i, row_nll, segments)
            done += len(members)
            progress(done, len(self.rows))
        return items

    def _batch(self, members: Sequence[int], size: int, block_size: int) -> tuple[Batch, Batch]:
        prompts, blocks = [], []
        for i in members:
            ids = self.prompts[i]
            prompt = {name: np.zeros(size, np.int32) for name in ("tokens", "segments", "positions")}
            prompt["tokens"][: len(ids)] = ids
            prompt["segments"][: len(ids)] = 1
            prompt["positions"][: len(ids)] = np.arange(len(ids))
            prompts.append(prompt)
            blocks.append(label_block(ids[-1], len(ids) - 1, self.labels[i], block_size))
        return tuple(  # type: ignore[return-value]
            {name: filled([one[name] for one in part], self.batch_size) for name in part[0]}
            for part in (prompts, blocks)
        )

    def _item(self, i: int, nll: np.ndarray, segments: np.ndarray) -> Item:
        row, labels = self.rows[i], self.labels[i]
        summed = np.bincount(segments, weights=nll.astype(np.float64), minlength=len(labels) + 1)[1:]
        lengths = np.array([len(label) if self.normalise == "mean" else 1 for label in labels])
        prediction = row["labels"][int(np.argmin(summed / lengths))]
        return {"id": row["id"], "prediction": prediction, "score": float(prediction in accepted(row))}
