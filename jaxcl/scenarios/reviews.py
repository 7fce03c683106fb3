"""Sentences about eleven products, good or bad: one label space, another product at every stage. Scenario 4.

Hu and Liu 2004; Ding, Liu and Yu 2008; in continual learning as the ASC and DSC streams of Ke et al.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import whole
from jaxcl.scenarios.reading import Row, cleaned, examples

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "product_reviews"
PRODUCTS = (
    "Apex_AD2600_Progressive_scan_DVD_player", "Canon_G3", "Creative_Labs_Nomad_Jukebox_Zen_Xtra_40GB",
    "Nikon_coolpix_4300", "Nokia_6610", "Canon_PowerShot_SD500", "Hitachi_router", "ipod", "Linksys_Router", "MicroMP3",
    "Nokia_6600",
)  # fmt: skip
PER_CLASS = 20


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.folder import instruct_evals, instruct_stages
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.macro_f1 import with_macro_f1

    settings.known(info, "per_class")
    test = {stage: _rows(stage, "test", settings) for stage in stages}
    train = {stage: _rows(stage, "train", settings) for stage in stages}
    train, notes = cleaned(train, test, lambda row: row["input"], settings)
    labels = {row["target"] for rows in train.values() for row in rows}
    keeps = examples(whole(settings, "per_class", PER_CLASS, 0) * len(labels))
    train = {stage: subsample(rows, settings.rows, settings.seed) for stage, rows in train.items()}
    test = {stage: subsample(rows, settings.test_rows, settings.seed) for stage, rows in test.items()}
    made = instruct_evals(
        test, tokenizer, window=settings.window, template=settings.template, batch_size=settings.batch_size
    )
    evals = {stage: with_macro_f1(one, test[stage]) for stage, one in zip(stages, made)}
    ids = {stage: [one.id for one in both] for stage, both in evals.items()}
    rows = instruct_stages(train, tokenizer, window=settings.window, template=settings.template, evals=ids)
    return Scenario(info, rows, [one for both in evals.values() for one in both], keeps, notes)


def _rows(stage: str, split: str, settings: Settings) -> list[Row]:
    from jaxcl.data.folder import read_split
    from jaxcl.data.jsonl import data_folder

    return read_split(Path(data_folder(FOLDER, settings.data_dir)), stage, split)


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    return [row["input"] for row in _rows(stage, "train", settings)]


STREAMS = (
    StreamInfo(
        name="reviews/products",
        scenario="text classification",
        stages=PRODUCTS,
        metric="accuracy (label ranking) and macro-F1, since classes are uneven",
        regime="DIL",
        card="cft/continual-text-classification",
        doc="sentiment of sentences about eleven products",
        unit="one product",
        keeps=f"option per_class rows of each label, {PER_CLASS} by default, counted in total",
        protocol="the test rows of every product after each stage; the labels are the same throughout",
        public=("github:nltk/nltk_data",),
        data=(FOLDER,),
        build=_build,
        texts=_texts,
    ),
)
