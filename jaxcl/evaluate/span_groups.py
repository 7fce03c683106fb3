"""Span F1 of a stream of entity types: each group of types alone, and all that were seen, from one pass. Card
cft/continual-ner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.evaluate.base import Eval, shared, stage_of
from jaxcl.evaluate.generation import written
from jaxcl.evaluate.spans import POOLS, judged

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

SEEN = "seen"


def span_f1_by_group(
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    groups: Mapping[str, Sequence[str]],
    **how: Any,
) -> list[Eval]:
    """One eval a group, called by its name: micro-F1 of its types alone, whatever else was answered; then the probes
    ``seen/f1_micro`` and ``seen/f1_macro`` over the types of all groups up to the run's present stage.

    rows: all test rows (`jaxcl.data.spans.instruct_row`, all tags kept); groups: {stage: its types}, in the stages'
    order. how: as for `jaxcl.evaluate.generation.generation`. The model writes once for all of them.
    """
    answers = written(SEEN, rows, tokenizer, window=window, **how)
    once, types = shared(answers), [name for group in groups.values() for name in group]

    def so_far(view: Any) -> Collection[str]:
        there = list(groups.values())[: stage_of(view, 0) + 1]
        return [name for group in there for name in group]

    def group_of(name: str) -> Callable[[Any], Collection[str]]:
        return lambda view: groups[name]

    hparams = answers.how.hparams()
    evals: list[Eval] = []
    for name in groups:
        evals += judged(name, rows, once, types, group_of(name), by=("f1_micro",), role="task", hparams=hparams)
    return evals + judged(SEEN, rows, once, types, so_far, by=POOLS, role="probe", hparams=hparams)
