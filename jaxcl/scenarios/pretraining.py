"""Continual pre-training: documents by domain, by language and by time, packed into blocks. Scenarios 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcl.errors import RequestError, unknown
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of
from jaxcl.scenarios.reading import Parts, Row, cleaned

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

SHARE = 0.1
"""Share of a stream's rows that may be held for replay, unless the option ``keep`` says another."""
MEASURED = "bits per byte (nats per token from the same pass)"
PROTOCOL = "held-out documents of every stage after each stage, beside the general suite where a run asks for it"
KEEPS = f"a share of the stream's rows to replay: option keep, {SHARE} by default"


class _Text(NamedTuple):
    """folder: in front of the data names, or of the stages where there are none. stages: of dated text first..last
    year."""

    folder: str
    stages: str
    kind: str
    card: str
    doc: str
    public: tuple[str, ...]
    data: tuple[str, ...] = ()


_SCIBERT, _FACTORY = "github:allenai/scibert", "github:hiyouga/LLaMA-Factory"
_NLTK, _UD = "github:nltk/nltk_data", "github:UniversalDependencies/UD_English-EWT"
_M2D2, _SHIFT, _DATED = "cpt/continual-pretraining-m2d2", "cpt/language-shift", "cpt/temporalwiki"
_WEB = ("hf:allenai/c4", "hf:wikimedia/wikipedia")
_GUIDE, _YEARS = "Debian package installation-guide-amd64", "a stage trains on documents of its years, never later ones"
_LONG = {
    "biomedical": "text_domains/biomedical",
    "legal": "text_domains/legal",
    "web": "text_domains/web",
    "wikipedia": "text_domains/wikipedia",
    "news": "olora_benchmark/agnews",
    "reviews": "olora_benchmark/amazon + olora_benchmark/yelp",
    "finance": "trace/FOMC + financial_phrasebank",
    "code": "trace/Py150",
}
_MANUAL_THEN_CODE = {
    "en": "text_languages/debian_guide/en",
    "de": "text_languages/debian_guide/de",
    "python": "trace/Py150",
}
_TEXT = {
    "domains": _Text(
        "text_domains", "biomedical computer_science legal web wikipedia", "vertical", _M2D2,
        "abstracts, licences, web pages, encyclopaedia", (_SCIBERT, _FACTORY, *_WEB),
    ),
    "domains_long": _Text(
        "", " ".join(_LONG), "vertical", _M2D2, "eight domains, from abstracts to source code",
        (_SCIBERT, _FACTORY, *_WEB, "hf:fancyzhx/ag_news", "hf:Yelp/yelp_review_full", "github:zjwang21/TRACE"),
        tuple(_LONG.values()),
    ),
    "languages": _Text(
        "text_languages/debian_guide", "en da sv de fr nl es", "language", _SHIFT, "one manual in seven languages",
        (_GUIDE,),
    ),
    "language_shift": _Text(
        "text_languages/ud", "en da is no", "language", _SHIFT, "treebanks' sentences, English to Nordic languages",
        (_UD,),
    ),
    "programming": _Text(
        "", " ".join(_MANUAL_THEN_CODE), "language", _SHIFT, "two natural languages, then a programming language",
        (_GUIDE, "github:zjwang21/TRACE"), tuple(_MANUAL_THEN_CODE.values()),
    ),
    "peps": _Text(
        "text_dated/peps", "1996..2003 2004..2009 2010..2014 2015..2019 2020..2024", "temporal", _DATED,
        "proposals for Python by the year they were made; the text may have been edited later", ("github:python/peps",),
    ),
    "state_union": _Text(
        "text_dated/state_union", "1945..1959 1960..1974 1975..1989 1990..2002", "temporal", _DATED,
        "speeches; " + _YEARS, (_NLTK,),
    ),
    "inaugural": _Text(
        "text_dated/inaugural", "1789..1849 1850..1899 1900..1949 1950..1997", "temporal", _DATED,
        "speeches over two centuries; " + _YEARS, (_NLTK,),
    ),
}  # fmt: skip


def corpus_scenario(
    info: StreamInfo, train: Parts, test: Parts, tokenizer: Tokenizer, settings: Settings, notes: Mapping[str, Any]
) -> Scenario:
    """Stages of blocks and two evals each, over ``text`` rows; rows of a stage are drawn by seed, as whole documents.

    What may be held of the past is the option ``keep``: a share of the stream's rows.
    """
    from jaxcl.data.blocks import text_source
    from jaxcl.data.stage import Stage, subsample
    from jaxcl.evaluate.held_out import held_out

    stages, evals = [], []
    for stage, learned in train.items():
        documents = _shuffled(learned, settings.seed) if settings.rows else learned
        size: dict[str, Any] = {"window": settings.window, "blocks": settings.rows}
        source = text_source(stage, documents, tokenizer, separate=bool(settings.option("separate", False)), **size)
        tests = subsample(test[stage], settings.test_rows, settings.seed)
        made = held_out(stage, tests, tokenizer, window=settings.window, batch_size=settings.batch_size)
        stages.append(Stage(stage, source, tuple(one.id for one in made)))
        evals += made
    return Scenario(info, stages, evals, share_of(stages, settings, SHARE), notes)


def check_dates(info: StreamInfo, train: Parts, settings: Settings) -> None:
    """No future data: RequestError where stages are not in the order of time, or a document is of no year of its stage.

    Stages are called by their year, '2020', or by the first and the last, '2015-2019'.
    """
    if settings.order != "given":
        raise RequestError(f"order={settings.order!r}: stream {info.name!r} goes forward in time; accepted: given")
    before = ""
    for stage, rows in train.items():
        low, _, high = stage.partition("-")
        if not before < low <= (high or low):
            raise RequestError(f"stream {info.name!r}: stage {stage!r} begins before {before!r} is over")
        before = high or low
        for row in rows:
            if not low <= str(row.get("date", ""))[:4] <= before:
                raise RequestError(
                    f"stream {info.name!r}: row {row['id']!r} is of {row.get('date')!r}, not of stage {stage!r}"
                )


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    settings.known(info, "keep", "separate")
    train = {stage: _read(info, stage, "train", settings) for stage in stages}
    test = {stage: _read(info, stage, "test", settings) for stage in stages}
    dated = info.scenario == "temporal domain"
    if dated:
        check_dates(info, train, settings)
    drop = ("near-duplicates",) if dated else ("test-in-train",)
    train, notes = cleaned(train, test, lambda row: row["text"], settings, drop=drop)
    return corpus_scenario(info, train, test, tokenizer, settings, notes)


def _read(info: StreamInfo, stage: str, split: str, settings: Settings) -> list[Row]:
    from jaxcl.data.corpora import documents

    return documents(dict(zip(info.stages, info.data))[stage], split, settings.data_dir)


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    return [row["text"] for row in _read(info, stage, "train", settings)]


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    import numpy as np

    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def _stream(name: str) -> StreamInfo:
    text = _TEXT[name]
    parts = text.stages.split()
    folders = [f"{text.folder}/date={part}" if ".." in part else f"{text.folder}/{part}" for part in parts]
    return StreamInfo(
        name=f"text/{name}",
        scenario=f"{text.kind} domain",
        stages=tuple(part.replace("..", "-") for part in parts),
        metric=MEASURED,
        regime="DIL",
        card=text.card,
        doc=text.doc,
        unit="documents of one domain, language or time, in blocks of tokens",
        keeps=KEEPS,
        protocol=PROTOCOL,
        public=text.public,
        data=text.data or tuple(folders),
        build=_build,
        texts=_texts,
    )


STREAMS = tuple(map(_stream, _TEXT))


def stream_data(stream: str) -> dict[str, str]:
    """{stage: data name} of a stream whose stages are folders of text, 'text/domains'. RequestError: no such stream."""
    known = {f"text/{name}": _stream(name) for name, text in _TEXT.items() if text.folder}
    if stream not in known:
        raise unknown("stream of text", stream, known)
    return dict(zip(known[stream].stages, known[stream].data, strict=True))
