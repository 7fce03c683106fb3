"""Continual text classification: data sets, domains or classes one after another, answered in words. Scenario 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.data.olora_orders import ORDERS
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.reading import Row, cleaned

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

_DOCS = {
    "order_4": "15 tasks, natural-language inference first (the order of SAPT's scripts)",
    "order_5": "15 tasks, MultiRC first; as the papers are remembered, checked against no file",
    "order_6": "15 tasks, yelp first: the long order of O-LoRA's released run",
}


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.core.types import ALL
    from jaxcl.data.olora import olora_evals, olora_stages

    settings.known(info, "by")
    shared: dict[str, Any] = {
        "window": settings.window,
        "template": settings.template.style,
        "prefix": settings.template.prefix,
        "seed": settings.seed,
    }
    made = olora_stages(stages, settings.data_dir, tokenizer, rows=settings.rows, **shared)
    by = settings.option("by", "ranking", ("ranking", "generation"))
    size: dict[str, Any] = {"rows": settings.test_rows, "batch_size": settings.batch_size}
    evals = olora_evals(stages, settings.data_dir, tokenizer, by=by, **size, **shared)
    train, test = (
        {stage: _read(info, stage, split, settings) for stage in stages} for split in ("train", "test")
    )
    _, notes = cleaned(train, test, lambda row: row["input"], settings)
    return Scenario(info, made, evals, ALL, notes)


def _read(info: StreamInfo, stage: str, split: str, settings: Settings) -> list[Row]:
    from jaxcl.data.folder import read_split
    from jaxcl.data.jsonl import data_folder

    return read_split(data_folder(info.data[0], settings.data_dir), stage, split)


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    return [row["input"] for row in _read(info, stage, "train", settings)]


STREAMS = tuple(
    StreamInfo(
        name=name,
        scenario="text classification",
        stages=stages,
        metric="accuracy (label ranking or exact match)",
        regime="CIL",  # no task id; the prompt lists the task's own options
        card="cft/continual-text-classification",
        doc=_DOCS.get(name.partition("/")[2], "the standard benchmark of four topic and sentiment data sets"),
        unit="one data set",
        keeps="all",
        protocol="the test set of every task after each stage; several orders",
        public=("github:cmnfriend/O-LoRA",),
        data=("olora_benchmark",),
        build=_build,
        texts=_texts,
    )
    for name, stages in ORDERS.items()
)
