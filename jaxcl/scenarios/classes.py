"""Class-incremental streams: every stage brings classes, and after it a row's candidates are all classes seen so far.

A test row is in the eval of its own class's stage and nowhere else; what it is compared with grows with the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.reading import Row, examples

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Groups = Mapping[str, Sequence[str]]
"""{stage: its classes}, in the stream's order."""


def grouped(names: Sequence[str], classes: Sequence[str], seed: int) -> dict[str, tuple[str, ...]]:
    """Classes in an order that ``seed`` draws, cut into one group for each name, all of one size.

    RequestError where the classes cannot be cut evenly.
    """
    import numpy as np

    size, rest = divmod(len(classes), len(names))
    if rest or not size:
        raise RequestError(f"{len(classes)} classes cannot be cut into {len(names)} groups of one size")
    order = np.random.default_rng([seed, 12]).permutation(len(classes))
    drawn = [classes[i] for i in order]
    return {name: tuple(drawn[i * size : (i + 1) * size]) for i, name in enumerate(names)}


def seen(groups: Groups, stage: int) -> list[str]:
    """All classes of the stages up to ``stage``, in the order in which they came."""
    return [name for group in list(groups.values())[: stage + 1] for name in group]


def of_group(rows: Sequence[Row], groups: Groups) -> dict[str, list[Row]]:
    """{stage: its rows}. RequestError: a row of no group, a class of two, a stage without rows."""
    owner: dict[str, str] = {}
    for stage, names in groups.items():
        for name in names:
            if owner.setdefault(name, stage) != stage:
                raise RequestError(f"class {name!r} is in the stages {owner[name]!r} and {stage!r}; accepted: one")
    found: dict[str, list[Row]] = {stage: [] for stage in groups}
    for row in rows:
        if row["target"] not in owner:
            raise RequestError(f"row {row['id']!r} has the class {row['target']!r}, which no stage has")
        found[owner[row["target"]]].append(row)
    for stage, own in found.items():
        if not own:
            raise RequestError(f"stage {stage!r} has no rows of its classes: {', '.join(groups[stage])}")
    return found


def class_incremental(
    info: StreamInfo,
    groups: Groups,
    train: Mapping[str, Sequence[Row]],
    test: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    per_class: int,
    notes: Mapping[str, Any],
) -> Scenario:
    """The stream of ``groups``; train, test: {stage: ``instruct`` rows without labels}, whose targets are the classes.

    per_class: rows of a class that may be held, so at most ``per_class`` times all classes. RequestError: see
    `data.folder.instruct_stages` and `evaluate.ranking.label_ranking`.
    """
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.ranking import label_ranking

    shared: dict[str, Any] = {"window": settings.window, "template": settings.template}
    rows = {stage: subsample(train[stage], settings.rows, settings.seed) for stage in groups}
    stages = instruct_stages(rows, tokenizer, label=lambda row: row["target"], **shared)
    evals = [
        label_ranking(
            stage,
            subsample(test[stage], settings.test_rows, settings.seed),
            tokenizer,
            labels_at=lambda at: seen(groups, at),
            stage=number,
            batch_size=settings.batch_size,
            **shared,
        )
        for number, stage in enumerate(groups)
    ]
    classes = {"classes": {stage: list(names) for stage, names in groups.items()}}
    keeps = examples(per_class * sum(map(len, groups.values())))
    return Scenario(info, stages, evals, keeps, {**notes, **classes})
