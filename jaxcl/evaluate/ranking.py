"""Label ranking: the answer is the label that the model finds most likely after the prompt.

Class-incremental streams give the candidates by stage: all labels seen so far (``labels_at``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data.encode import check_frames, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, nearest, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, accepted, check_items, stage_of
from jaxcl.evaluate.endings import endings_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


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
    labels_at: Callable[[int], Sequence[str]] | None = None,
    stage: int = 0,
) -> Eval:
    """Accuracy of the best of a row's ``labels``; on a tie the first label wins.

    A label's score is the log-probability of its tokens and the end-of-sequence token, summed ('sum') or per
    token ('mean'). Prompts are shortened as in training, to ``window`` less the longest label.

    labels_at: the candidates of all rows at a stage, every label seen until then, in place of those in the rows. The
    stage is the run's present one, at least the eval's own ``stage``. The prompt itself still lists the row's
    ``labels`` where it has some. Such an eval states no chance, because its candidates become more.

    RequestError: no rows, a row without labels, a target that is no label (or not among those seen), labels that do not
    fit.
    """
    check_items(eval_id, rows, batch_size)
    if normalise not in ("sum", "mean"):
        raise unknown("normalisation", normalise, ("sum", "mean"))
    ranking = _Ranking(
        eval_id, rows, tokenizer, template or Template(), window, batch_size, normalise, labels_at, stage
    )
    chance = None if labels_at else sum(1 / len(row["labels"]) for row in rows) / len(rows)
    return Eval(eval_id, "accuracy", len(rows), ranking, role=role, chance=chance)


class _Ranking:
    """The evaluator: labels are encoded when they are first seen, prompts at the first run; both are kept."""

    def __init__(
        self,
        eval_id: str,
        rows: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        template: Template,
        window: int,
        batch_size: int,
        normalise: str,
        labels_at: Callable[[int], Sequence[str]] | None,
        stage: int,
    ) -> None:
        self.id, self.rows, self.tokenizer, self.template = eval_id, list(rows), tokenizer, template
        self.window, self.batch_size, self.normalise = window, batch_size, normalise
        self.labels_at, self.stage = labels_at, stage
        self.ids: dict[str, list[int]] = {}
        rooms = self._rooms(self.labels(stage))
        check_frames(rows, rooms, template, tokenizer)
        self.prompts: tuple[list[int], list[np.ndarray]] = ([], [])

    def labels(self, stage: int) -> list[Sequence[str]]:
        """The candidates of each row, the row's target among them."""
        seen = None if self.labels_at is None else list(self.labels_at(stage))
        found: list[Sequence[str]] = [row.get("labels") or [] if seen is None else seen for row in self.rows]
        for row, labels in zip(self.rows, found):
            if not labels:
                raise RequestError(f"eval {self.id!r}: row {row['id']!r} has no labels to rank")
            if not set(accepted(row)) & set(labels):
                where = "of its labels" if seen is None else f"of the labels seen at stage {stage}"
                raise RequestError(
                    f"eval {self.id!r}: row {row['id']!r} has the target {row['target']!r}, not one {where}; "
                    f"{nearest(row['target'], labels)}"
                )
        return found

    def _ids(self, label: str) -> list[int]:
        if label not in self.ids:
            self.ids[label] = target_ids({"target": label}, self.template, self.tokenizer)
        return self.ids[label]

    def _rooms(self, labels: Sequence[Sequence[str]]) -> list[int]:
        return [self.window - max(len(self._ids(label)) for label in each) for each in labels]

    def _prompts(self, rooms: list[int]) -> list[np.ndarray]:
        if self.prompts[0] != rooms:
            pairs = zip(self.rows, rooms)
            made = [fit_prompt(row, self.template, self.tokenizer, room) for row, room in pairs]
            self.prompts = (rooms, [np.array(ids, np.int32) for ids in made])
        return self.prompts[1]

    def __call__(self, view: Any, progress: Progress) -> list[Item]:
        labels = self.labels(stage_of(view, self.stage) if self.labels_at else self.stage)
        prompts = self._prompts(self._rooms(labels))
        endings = [[self._ids(label) for label in each] for each in labels]
        found = endings_nll(view, prompts, endings, self.batch_size, progress)
        return [self._item(*each) for each in zip(self.rows, labels, (nll for nll, _ in found))]

    def _item(self, row: dict[str, Any], labels: Sequence[str], nll: np.ndarray) -> Item:
        lengths = [len(self._ids(label)) if self.normalise == "mean" else 1 for label in labels]
        prediction = labels[int(np.argmin(nll / np.array(lengths)))]
        return {"id": row["id"], "prediction": prediction, "score": float(prediction in accepted(row))}
