"""The streams of stages that jaxcl knows by name: facts only, so that listing them reads no data."""

from __future__ import annotations

from typing import NamedTuple


class StreamInfo(NamedTuple):
    """stages: their names in order. regime: what a method is told (TIL: task ids too; DIL, CIL: not).
    card: the specification's name."""

    name: str
    scenario: str
    stages: tuple[str, ...]
    metric: str
    regime: str
    card: str
    doc: str


_ORDERS = {
    "order_1": "dbpedia amazon yahoo agnews",
    "order_2": "dbpedia amazon agnews yahoo",
    "order_3": "yahoo amazon agnews dbpedia",
    "order_4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "order_5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "order_6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
_DOCS = {
    "order_4": "15 tasks, natural-language inference first (the order of SAPT's scripts)",
    "order_5": "15 tasks, MultiRC first; as the papers are remembered, checked against no file",
    "order_6": "15 tasks, yelp first: the long order of O-LoRA's released run",
}


def _olora(order: str) -> StreamInfo:
    stages = tuple(_ORDERS[order].split())
    return StreamInfo(
        name=f"olora/{order}",
        scenario="continual text classification, text to text"
        if len(stages) == 4
        else "long sequence of text classification tasks, text to text",
        stages=stages,
        metric="accuracy (label ranking or exact match)",
        regime="CIL",  # no task id; the prompt lists the task's own options
        card="cft/continual-text-classification",
        doc=_DOCS.get(order, "the standard benchmark of four topic and sentiment data sets"),
    )


STREAMS: dict[str, StreamInfo] = {info.name: info for info in map(_olora, _ORDERS)}
