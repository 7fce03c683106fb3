"""CLINC150: 150 intents of ten domains, class-incremental: groups of intents or whole domains. Scenario 4.

Larson et al. 2019 (arXiv 1909.02027). Labels are global: after a stage a sentence is compared with every intent seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.classes import Groups, class_incremental, grouped, of_group
from jaxcl.scenarios.keeping import whole
from jaxcl.scenarios.reading import Row, cleaned

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "intent/clinc150"
DOMAINS = (
    "banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute", "travel", "utility", "work",
    "small_talk", "meta",
)  # fmt: skip
PER_CLASS = 20
QUESTION = "Which intent does the user express?\n"


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    settings.known(info, "per_class")
    all_groups = _groups(info, settings)
    groups = {stage: all_groups[stage] for stage in stages}
    test = of_group(_rows("test", settings), groups)
    train = of_group(_rows("train", settings), groups)
    train, notes = cleaned(train, test, lambda row: row["input"], settings, drop=("test-in-train",))
    per_class = whole(settings, "per_class", PER_CLASS, 0)
    return class_incremental(info, groups, train, test, tokenizer, settings, per_class=per_class, notes=notes)


def _groups(info: StreamInfo, settings: Settings) -> Groups:
    """{stage: its intents}: the domains' own, or groups of one size from an order that the seed draws."""
    domains = _domains(_folder(settings) / "domains.json")
    if set(info.stages) <= set(domains):
        return domains
    return grouped(info.stages, [name for names in domains.values() for name in names], settings.seed)


def _domains(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {domain: [_words(name) for name in found[domain]] for domain in DOMAINS}
    except FileNotFoundError as error:
        raise RequestError(f"no data file {path}, which names the intents of each domain") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        wanted = f"{{domain: [intents]}} for {', '.join(DOMAINS)}"
        raise RequestError(f"{path}: expected {wanted} ({type(error).__name__}: {error})") from error


def _rows(split: str, settings: Settings) -> list[Row]:
    """Rows whose targets are the intents' names in words; no row lists its options, which would tell the stage."""
    from jaxcl.data.jsonl import read_rows

    rows = read_rows(_folder(settings) / f"{split}.jsonl.gz", "instruct")
    asked = {"task": "intents", "instruction": QUESTION}  # a row's own task is its domain
    return [row | asked | {"target": _words(row["target"])} for row in rows]


def _folder(settings: Settings) -> Path:
    from jaxcl.data.jsonl import data_folder

    return data_folder(FOLDER, settings.data_dir)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    classes = set(_groups(info, settings)[stage])
    return [row["input"] for row in _rows("train", settings) if row["target"] in classes]


def _stream(name: str, stages: Sequence[str], unit: str, doc: str) -> StreamInfo:
    return StreamInfo(
        name=f"intent/{name}",
        scenario="text classification",
        stages=tuple(stages),
        metric="accuracy over all intents seen (label ranking)",
        regime="CIL",
        card="cft/continual-text-classification",
        doc=doc,
        unit=unit,
        keeps=f"option per_class rows of each intent, {PER_CLASS} by default, counted in total",
        protocol="the test rows of every stage after each stage; candidates are all intents seen so far",
        public=("hf:clinc/clinc_oos", "tfds:clinc_oos", "github:clinc/oos-eval"),
        data=(FOLDER,),
        build=_build,
        texts=_texts,
    )


STREAMS = (
    _stream(
        "clinc150",
        [f"intents_{n:02}" for n in range(1, 16)],
        "ten intents",
        "150 intents in an order drawn by seed, ten a stage",
    ),
    _stream("clinc150_domains", DOMAINS, "the fifteen intents of one domain", "150 intents by their domain"),
)
