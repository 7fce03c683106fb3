"""The streams of stages that jaxcl knows by name: facts only, so that listing them reads no data."""

from __future__ import annotations

from typing import NamedTuple


class StreamInfo(NamedTuple):
    """stages: their names in order. regime: what a method is told (TIL: task ids too; DIL, CIL: not).
    card: the specification's name. data: the stages' data by name (see `jaxcl.data.named`), where one reads it so."""

    name: str
    scenario: str
    stages: tuple[str, ...]
    metric: str
    regime: str
    card: str
    doc: str
    data: tuple[str, ...] = ()


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


_DOMAINS = "biomedical computer_science legal web wikipedia"
_YEARS = "a stage trains on documents of its years; its eval holds out others of the same years"
_TEXT = {  # folder, stages (of dated text: first..last year), scenario, card, doc
    "domains": ("text_domains", _DOMAINS, "domain", "cpt/continual-pretraining-m2d2", "abstracts, licences, web"),
    "languages": ("text_languages/debian_guide", "en da sv de fr nl es", "language", "cpt/language-shift", "a manual"),
    "language_shift": ("text_languages/ud", "en da is no", "language", "cpt/language-shift", "treebanks' sentences"),
    "peps": ("text_dated/peps", "1996..2003 2004..2009 2010..2014 2015..2019 2020..2024", "temporal", "", _YEARS),
    "state_union": ("text_dated/state_union", "1945..1959 1960..1974 1975..1989 1990..2002", "temporal", "", _YEARS),
    "inaugural": ("text_dated/inaugural", "1789..1849 1850..1899 1900..1949 1950..1997", "temporal", "", _YEARS),
}


def _text(name: str) -> StreamInfo:
    folder, parts, kind, card, doc = _TEXT[name]
    return StreamInfo(
        name=f"text/{name}",
        scenario=f"continual pre-training, {kind} incremental",
        stages=tuple(part.replace("..", "-") for part in parts.split()),
        metric="bits per byte",
        regime="DIL",
        card=card or "cpt/temporalwiki",
        doc=doc,
        data=tuple(f"{folder}/date={part}" if ".." in part else f"{folder}/{part}" for part in parts.split()),
    )


STREAMS: dict[str, StreamInfo] = {info.name: info for info in (*map(_olora, _ORDERS), *map(_text, _TEXT))}
