"""Task-incremental learning: the model is told which task a row is of, in training and at test.

Task t is stage t. A method that needs to be told (HAT) reads ``batch['task_id']``, i32[B]; no other run has this field.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxcl.core.experiment import Experiment
from jaxcl.data.encode import Example
from jaxcl.data.stage import Source
from jaxcl.evaluate.base import Eval, Item, Progress

NO_TASK = -1


def til(exp: Experiment) -> Experiment:
    """The experiment in which every row, in training and at test, comes with its ``task_id``.

    An eval is of the task whose stage alone teaches it (``Stage.evals``); one that no stage teaches, or that several
    do, is of `NO_TASK`.
    """
    stages = [dataclasses.replace(s, train=Told(s.train, t)) for t, s in enumerate(exp.stages)]
    return dataclasses.replace(exp, stages=stages, evals=[told(e, task_of(e.id, exp.stages)) for e in exp.evals])


class Told:
    """A `Source` whose examples have ``task_id`` i32[] beside what the source gives."""

    def __init__(self, source: Source, task: int):
        self.source, self.task, self.name = source, task, source.name
        self.packs = getattr(source, "packs", False)
        self.label, self.record, self.id = source.label, source.record, source.id

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        return self.source[i] | {"task_id": np.int32(self.task)}


def told(test: Eval, task: int) -> Eval:
    """The eval whose rows are of ``task``."""

    def run(view: Any, progress: Progress) -> list[Item]:
        return test.run(view.of(task), progress)

    return dataclasses.replace(test, run=run)


def task_of(eval_id: str, stages: Any) -> int:
    """The number of the only stage that teaches the eval, else `NO_TASK`."""
    teachers = [t for t, stage in enumerate(stages) if eval_id in stage.evals]
    return teachers[0] if len(teachers) == 1 else NO_TASK
