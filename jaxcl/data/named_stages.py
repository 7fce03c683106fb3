"""Stages and their evals from data by name: text for continual pre-training, questions with answers for fine-tuning.

Each data set is one stage and teaches one eval of the same name. Stages read the training split, evals the test split;
splits that share a row are refused, also between stages that choose from one data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcl.data.blocks import text_source
from jaxcl.data.columns import Columns, Row, task_name
from jaxcl.data.folder import instruct_evals, instruct_stages
from jaxcl.data.named import parse, train_and_test
from jaxcl.data.stage import Stage, subsample
from jaxcl.data.template import Template
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

Names = Sequence[str] | Mapping[str, str]
"""Data names; where they are a mapping, its keys name the stages."""


def text_stages(
    data: Names,
    tokenizer: Tokenizer,
    *,
    window: int,
    train: str = "train",
    test: str = "test",
    columns: Columns | None = None,
    data_dir: str | Path | None = None,
    blocks: int | None = None,
    separate: bool = False,
    test_rows: int | None = None,
    seed: int = 0,
    metric: str = "bits_per_byte",
    batch_size: int = 16,
) -> tuple[list[Stage], list[Eval]]:
    """(stages, evals) of documents: next-token targets everywhere in blocks, held-out documents scored by ``metric``.

    data, train, test: names and splits as in `named`. blocks, separate: see `blocks.text_source`. test_rows: at most
    so many test documents, drawn by ``seed``. metric: 'bits_per_byte', 'nll' (perplexity is its exponential) or
    'accuracy'. RequestError: see `named.train_and_test`, `text_source` and `evaluate.nll.text_nll`.
    """
    from jaxcl.evaluate.nll import text_nll

    stages, evals = [], []
    parts = train_and_test(_named(data), train, test, schema="text", columns=columns, data_dir=data_dir)
    for stage, (learned, held_out) in parts.items():
        source = text_source(stage, learned, tokenizer, window=window, blocks=blocks, separate=separate)
        stages.append(Stage(stage, source, (stage,)))
        tests = subsample(held_out, test_rows, seed)
        evals.append(text_nll(stage, tests, tokenizer, window=window, batch_size=batch_size, metric=metric))
    return stages, evals


def answer_stages(
    data: Names,
    tokenizer: Tokenizer,
    *,
    window: int,
    train: str = "train",
    test: str = "test",
    columns: Columns | None = None,
    data_dir: str | Path | None = None,
    rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
    template: Template | None = None,
    by: str = "ranking",
    batch_size: int = 16,
) -> tuple[list[Stage], list[Eval]]:
    """(stages, evals) of ``instruct`` rows: the answer is the target, the best label or the generation is scored.

    rows, test_rows: at most so many of a stage, drawn by ``seed``. by, template: see `folder.folder_evals`; the rest as
    in `text_stages`. RequestError: also a target or an instruction that does not fit into ``window``.
    """
    learned: dict[str, list[Row]] = {}
    held_out: dict[str, list[Row]] = {}
    parts = train_and_test(_named(data), train, test, columns=columns, data_dir=data_dir)
    for stage, (trains, tests) in parts.items():
        learned[stage], held_out[stage] = subsample(list(trains), rows, seed), subsample(tests, test_rows, seed)
    stages = instruct_stages(learned, tokenizer, window=window, template=template)
    evals = instruct_evals(held_out, tokenizer, window=window, template=template, batch_size=batch_size, by=by)
    return stages, evals


def stage_name(name: str) -> str:
    """What a stage is called that no one named: the last part of its data's name, with what was chosen from it."""
    found = parse(name)
    chosen = [value if high is None else f"{value}..{high}" for _, value, high in found.chosen]
    return "-".join([task_name(found.path), *chosen])


def _named(data: Names) -> dict[str, str]:
    if isinstance(data, str):
        raise RequestError(f"data={data!r} is one name; accepted: a list of them, one a stage")
    pairs = list(data.items()) if isinstance(data, Mapping) else [(stage_name(name), name) for name in data]
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(s for n, (s, _) in enumerate(pairs) if s in dict(pairs[:n]))
        raise RequestError(f"two stages would be named {twice!r}; give a mapping of stage names to data names")
    return named
