"""Dated news with questions about it: what stays, what changed and what is new, after every year. Scenario 3.

The three sets of probes play the roles of CKL's (Jang et al. 2022): invariant facts to retain, updated ones to
overwrite, new ones to acquire, so that FUAR can be read off (`jaxcl.metrics.fuar`). They are stand-ins, not CKL's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.pretraining import KEEPS, MEASURED, check_dates, corpus_scenario
from jaxcl.scenarios.reading import Row, cleaned

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

YEARS = ("2020", "2021", "2022", "2023", "2024", "2025")
HELD_OUT = 10
"""One of so many documents of a year is held out to be measured; its questions are asked of no one."""
QUESTION = "Question: {prompt}\nAnswer:"
INVARIANT, UPDATED, NEWS = "probes/lama_pararel", "probes/situatedqa_temp", "probes/realtimeqa"


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.jsonl import data_folder

    settings.known(info, "keep", "separate")
    root = data_folder("probes", settings.data_dir)
    news: dict[str, list[Row]] = {}
    train: dict[str, list[Row]] = {}
    test: dict[str, list[Row]] = {}
    for year in stages:
        news[year] = _news(root, year)
        held = _held_out(news[year], settings.seed)
        train[year] = [_document(row) for row in news[year] if row["id"] not in held]
        test[year] = [_document(row) for row in news[year] if row["id"] in held]
    check_dates(info, train, settings)
    train, notes = cleaned(train, test, lambda row: row["text"], settings, drop=("near-duplicates", "test-in-train"))
    known = [row for row in _read(root / "lama_pararel" / "test.jsonl.gz") if row.get("stable")]
    changed = _read(root / "situatedqa_temp" / "updated_pairs.jsonl.gz")
    made = corpus_scenario(info, train, test, tokenizer, settings, {**notes, "probes": "stand-ins for CKL's sets"})
    sets = {"invariant": known, "updated": changed}
    for year, rows in news.items():
        told = {row["id"] for row in train[year]}
        sets[f"new/{year}"] = [row for row in rows if row["id"] in told]
    probes = _probes(sets, tokenizer, settings)
    return Scenario(info, made.stages, [*made.evals, *probes], made.keeps, made.notes)


def _probes(sets: dict[str, list[Row]], tokenizer: Tokenizer, settings: Settings) -> list[Eval]:
    """One eval a set: does the greedy continuation begin with one of the answers, of a cloze as it is or of a question?
    """
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.probes import probes

    size: dict[str, Any] = {"window": settings.window, "batch_size": settings.batch_size}
    found: list[Eval] = []
    for name, rows in sets.items():
        frame = "{prompt}" if name == "invariant" else QUESTION
        drawn = subsample(rows, settings.test_rows, settings.seed)
        found += probes(name, drawn, tokenizer, metrics=("exact_match",), frame=frame, role="probe", **size)
    return found


def _read(path: Path) -> list[Row]:
    from jaxcl.data.jsonl import read_rows

    return read_rows(path, "probe")


def _news(root: Path, year: str) -> list[Row]:
    """The year's questions that come with the news text they are about."""
    path = root / "realtimeqa" / f"{year}.jsonl.gz"
    rows = [row for row in _read(path) if str(row.get("evidence") or "").strip()]
    if len(rows) < 2:
        raise RequestError(f"{path}: {len(rows)} questions have evidence; accepted: two or more, one to hold out")
    return rows


def _held_out(rows: Sequence[Row], seed: int) -> set[str]:
    """Ids of the rows that are not trained on."""
    import numpy as np

    drawn = np.random.default_rng([seed, 13]).permutation(len(rows))[: max(1, len(rows) // HELD_OUT)]
    return {rows[i]["id"] for i in drawn}


def _document(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "text": row["evidence"], "date": row.get("date", "")}


STREAMS = (
    StreamInfo(
        name="temporal/probes",
        scenario="temporal domain",
        stages=YEARS,
        metric=MEASURED + "; probes: exact match",
        regime="DIL",
        card="cpt/ckl",
        doc="news by year; facts that stay, that changed, that are new",
        unit="news paragraphs of one year, in blocks of tokens",
        keeps=KEEPS,
        protocol="held-out news of past, present and coming years and all probes after each stage; FUAR",
        public=("github:realtimeqa/realtimeqa_public", "github:yanaiela/pararel", "github:mikejqzhang/SituatedQA"),
        data=(NEWS, INVARIANT, UPDATED),
        build=_build,
    ),
)
