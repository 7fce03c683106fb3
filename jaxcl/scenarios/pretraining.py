"""Continual pre-training: documents by domain, by language and by time, packed into blocks. Scenarios 1 to 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxcl.errors import unknown
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

_DOMAINS = "biomedical computer_science legal web wikipedia"
_YEARS = "a stage trains on documents of its years; its eval holds out others of the same years"
_TEXT = {  # folder, stages (of dated text: first..last year), scenario, card, doc
    "domains": ("text_domains", _DOMAINS, "vertical", "cpt/continual-pretraining-m2d2", "abstracts, licences, web"),
    "languages": ("text_languages/debian_guide", "en da sv de fr nl es", "language", "cpt/language-shift", "a manual"),
    "language_shift": ("text_languages/ud", "en da is no", "language", "cpt/language-shift", "treebanks' sentences"),
    "peps": ("text_dated/peps", "1996..2003 2004..2009 2010..2014 2015..2019 2020..2024", "temporal", "", _YEARS),
    "state_union": ("text_dated/state_union", "1945..1959 1960..1974 1975..1989 1990..2002", "temporal", "", _YEARS),
    "inaugural": ("text_dated/inaugural", "1789..1849 1850..1899 1900..1949 1950..1997", "temporal", "", _YEARS),
}


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.core.types import ALL
    from jaxcl.data.named_stages import text_stages

    data = dict(zip(info.stages, info.data))
    made, evals = text_stages(
        {stage: data[stage] for stage in stages},
        tokenizer,
        window=settings.window,
        data_dir=settings.data_dir,
        blocks=settings.rows,
        test_rows=settings.test_rows,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    return Scenario(info, made, evals, ALL)


def _stream(name: str) -> StreamInfo:
    folder, parts, kind, card, doc = _TEXT[name]
    return StreamInfo(
        name=f"text/{name}",
        scenario=f"{kind} domain",
        stages=tuple(part.replace("..", "-") for part in parts.split()),
        metric="bits per byte",
        regime="DIL",
        card=card or "cpt/temporalwiki",
        doc=doc,
        unit="documents of one domain, language or time, in blocks of tokens",
        keeps="all",
        protocol="held-out documents of every stage after each stage",
        public=(),
        data=tuple(f"{folder}/date={part}" if ".." in part else f"{folder}/{part}" for part in parts.split()),
        build=_build,
    )


STREAMS = tuple(map(_stream, _TEXT))


def stream_data(stream: str) -> dict[str, str]:
    """{stage: data name} of a stream of text, 'text/domains'. RequestError: no such stream."""
    known = {info.name: info for info in STREAMS}
    if stream not in known:
        raise unknown("stream of text", stream, known)
    return dict(zip(known[stream].stages, known[stream].data, strict=True))
