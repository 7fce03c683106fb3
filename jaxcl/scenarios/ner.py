"""Continual named entity recognition, answers in words (``type: surface; type: surface``). Scenario 5.

Domain-incremental over CrossNER and two biomedical sets, or type-incremental in one domain: there a stage annotates its
own types alone, entities of old and of future types count as none (Monaikul et al. 2021; CFNER, arXiv 2210.03980).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import whole
from jaxcl.scenarios.reading import Row, cleaned, examples

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

DOMAINS = ("conll2003", "politics", "science", "music", "ai", "ncbi_disease", "bc5cdr")
TYPES = {  # stream: the domain, and its types by stage
    "ner/types": ("conll2003", ("person", "location", "organisation", "misc")),
    "ner/types_politics": (  # three types, then two at a time, in alphabetical order
        "politics",
        ("country-election-event", "location-misc", "organisation-person", "politicalparty-politician"),
    ),
}
PER_CLASS = 10
QUESTION = "List the named entities with their types.\n"


def _domains(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    """One domain a stage; the question names its types, as whoever works in that domain would."""
    from jaxcl.data.ner import ner_rows, types_of
    from jaxcl.data.spans import instruct_row
    from jaxcl.evaluate.spans import span_f1

    settings.known(info, "per_class")
    test = {stage: ner_rows(stage, "test", settings.data_dir) for stage in stages}
    train = {stage: ner_rows(stage, "train", settings.data_dir) for stage in stages}
    train, notes = cleaned(train, test, _sentence, settings, drop=("test-in-train",))
    types = {stage: types_of([*train[stage], *test[stage]]) for stage in stages}
    evals: dict[str, list[Eval]] = {}
    asked: dict[str, list[Row]] = {}
    for stage in stages:
        question = f"List the named entities of the types {', '.join(types[stage])}.\n"
        asked[stage] = [instruct_row(row, question) for row in train[stage]]
        rows = [instruct_row(row, question) for row in _drawn(test[stage], settings.test_rows, settings)]
        evals[stage] = span_f1(stage, rows, tokenizer, types=types[stage], **_how(rows, tokenizer, settings))
    return _scenario(info, asked, evals, [], tokenizer, settings, sum(map(len, types.values())), notes)


def _types(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    """Some types of one domain a stage; the question is the same throughout, so nothing tells the stage."""
    from jaxcl.data.ner import ner_rows, only, sliced
    from jaxcl.data.spans import instruct_row
    from jaxcl.evaluate.span_groups import span_f1_by_group

    settings.known(info, "per_class")
    domain, groups = TYPES[info.name][0], {stage: stage.split("-") for stage in stages}
    test = ner_rows(domain, "test", settings.data_dir)
    rows = {domain: ner_rows(domain, "train", settings.data_dir)}
    rows, notes = cleaned(rows, {domain: test}, _sentence, settings, drop=("test-in-train",))
    slices = sliced(rows[domain], groups, settings.seed)
    asked = {stage: [instruct_row(only(row, groups[stage]), QUESTION) for row in slices[stage]] for stage in stages}
    tests = [instruct_row(row, QUESTION) for row in _drawn(test, settings.test_rows, settings)]
    made = span_f1_by_group(tests, tokenizer, groups=groups, **_how(tests, tokenizer, settings))
    own = {one.id: [one] for one in made if one.id in groups}
    seen = [one for one in made if one.id not in groups]
    return _scenario(info, asked, own, seen, tokenizer, settings, sum(map(len, groups.values())), notes)


def _scenario(
    info: StreamInfo,
    rows: Mapping[str, Sequence[Row]],
    own: Mapping[str, Sequence[Eval]],
    others: Sequence[Eval],
    tokenizer: Tokenizer,
    settings: Settings,
    types: int,
    notes: Mapping[str, Any],
) -> Scenario:
    """rows: {stage: training rows}, own: {stage: the evals it teaches}; ``types``: how many there are of the whole."""
    from jaxcl.data.fitting import fitting
    from jaxcl.data.folder import instruct_stages

    template, window = settings.template, settings.window
    kept, left_out = fitting(rows, tokenizer, template, window, most=settings.rows, seed=settings.seed)
    ids = {stage: [one.id for one in evals] for stage, evals in own.items()}
    stages = instruct_stages(kept, tokenizer, window=window, template=template, evals=ids)
    notes = {**notes, **({"left out: answers longer than the window": left_out} if left_out else {})}
    keeps = examples(whole(settings, "per_class", PER_CLASS, 0) * types)
    return Scenario(info, stages, [*(one for evals in own.values() for one in evals), *others], keeps, notes)


def _how(rows: Sequence[Row], tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """How answers to these rows are written: as long as the longest right one may be, where the window has the room."""
    from jaxcl.data.fitting import answer_room

    shared: dict[str, Any] = {"window": settings.window, "template": settings.template}
    return {**shared, "batch_size": settings.batch_size, "max_new": answer_room(rows, tokenizer, **shared)}


def _drawn(rows: Sequence[Row], most: int | None, settings: Settings) -> list[Row]:
    from jaxcl.data.stage import subsample

    return subsample(rows, most, settings.seed)


def _sentence(row: Row) -> str:
    return " ".join(row["tokens"])


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    """The sentences of a domain, or those with an entity of the stage's types."""
    from jaxcl.data.ner import ner_rows, types_of

    domain = TYPES[info.name][0] if info.name in TYPES else stage
    rows = ner_rows(domain, "train", settings.data_dir)
    return [_sentence(row) for row in rows if info.name not in TYPES or set(types_of([row])) & set(stage.split("-"))]


_PUBLIC = ("hf:DFKI-SLT/cross_ner", "hf:eriktks/conll2003", "github:zliucr/CrossNER")
_KEEPS = f"option per_class sentences for each entity type, {PER_CLASS} by default, counted in total"
_SHARED: dict[str, Any] = {
    "scenario": "named entity recognition",
    "card": "cft/continual-ner",
    "keeps": _KEEPS,
    "texts": _texts,
}
STREAMS = (
    StreamInfo(
        name="ner/domains",
        stages=DOMAINS,
        metric="strict span F1, micro and macro over the domain's types",
        regime="DIL",
        doc="seven domains: news, four of CrossNER, two biomedical",
        unit="one domain, all its types annotated; the question names them",
        protocol="the test sentences of every domain after each stage",
        public=(*_PUBLIC, "github:allenai/scibert"),
        data=tuple(f"ner/{domain}" for domain in DOMAINS),
        build=_domains,
        **_SHARED,
    ),
    *(
        StreamInfo(
            name=name,
            stages=stages,
            metric="strict span micro-F1 of each stage's types; micro and macro over all types seen as probes",
            regime="CIL",
            doc=f"the types of {domain} one after another, as named in the stages",
            unit="a disjoint slice of the sentences with only the stage's types annotated",
            protocol="all test sentences after each stage; old and future types of a training slice count as none",
            public=_PUBLIC,
            data=(f"ner/{domain}",),
            build=_types,
            **_SHARED,
        )
        for name, (domain, stages) in TYPES.items()
    ),
)
