"""Continual machine translation: a new direction at every stage, over captions in three languages. Scenario 7.

The instruction names both languages, as whoever wants a translation does. Domain adaptation, the other form of this
scenario, has no data here: Multi30k is one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of
from jaxcl.scenarios.reading import Row, cleaned

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "translation/multi30k"
DIRECTIONS = ("en-de", "en-fr", "de-fr", "de-en", "fr-en", "fr-de")
SHARE = 0.1


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.fitting import fitting
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.stage import subsample
    from jaxcl.data.translation import directed

    settings.known(info, "keep", "zero_shot")
    train, test = _rows("train", settings), _rows("test", settings)
    notes: dict[str, Any] = {}
    for language in ("en", "de", "fr"):
        found, noted = cleaned({"train": train}, {"test": test}, lambda row: row[language], settings)  # noqa: B023
        train, notes = found["train"], notes | noted
    drawn, tests = (
        subsample(rows, most, settings.seed) for rows, most in ((train, settings.rows), (test, settings.test_rows))
    )
    unseen = [d for d in DIRECTIONS if d not in stages] if settings.option("zero_shot", True, (True, False)) else []
    evals = {d: _evals(d, directed(tests, d), tokenizer, settings, "task") for d in stages}
    probes = [one for d in unseen for one in _evals(d, directed(tests, d), tokenizer, settings, "probe")]
    template, window = settings.template, settings.window
    kept, left_out = fitting({d: directed(drawn, d) for d in stages}, tokenizer, template, window)
    ids = {d: [one.id for one in both] for d, both in evals.items()}
    made = instruct_stages(kept, tokenizer, window=window, template=template, evals=ids)
    notes |= {"left out: answers longer than the window": left_out} if left_out else {}
    taught = [one for both in evals.values() for one in both]
    return Scenario(info, made, [*taught, *probes], share_of(made, settings, SHARE), notes)


def _evals(direction: str, rows: Sequence[Row], tokenizer: Tokenizer, settings: Settings, role: str) -> list[Eval]:
    """BLEU and chrF of one direction, from one pass."""
    from jaxcl.data.fitting import answer_room
    from jaxcl.evaluate.generation import generation

    shared: dict[str, Any] = {"window": settings.window, "template": settings.template}
    room = answer_room(rows, tokenizer, **shared)
    how: dict[str, Any] = {"max_new": room, "batch_size": settings.batch_size, "role": role, **shared}
    return generation(direction, rows, tokenizer, metrics=("bleu", "chrf"), **how)


def _rows(split: str, settings: Settings) -> list[Row]:
    from jaxcl.data.jsonl import data_folder, read_rows

    return read_rows(data_folder(FOLDER, settings.data_dir) / f"{split}.jsonl.gz", "translation")


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    """Both sides of a direction: directions that share a language are alike."""
    source, _, target = stage.partition("-")
    return [row[side] for row in _rows("train", settings) for side in (source, target)]


def _stream(name: str, stages: Sequence[str], doc: str) -> StreamInfo:
    return StreamInfo(
        name=f"translation/{name}",
        scenario="machine translation",
        stages=tuple(stages),
        metric="BLEU (sacrebleu) and chrF",
        regime="DIL",  # no task id; the question names the two languages
        card="cft/continual-machine-translation",
        doc=doc,
        unit="one direction of translation",
        keeps=f"a share of the stream's rows to replay: option keep, {SHARE} by default",
        protocol="every direction after each stage; directions that no stage teaches as probes (option zero_shot)",
        public=("github:multi30k/dataset", "hf:bentrevett/multi30k"),
        data=(FOLDER,),
        build=_build,
        texts=_texts,
    )


STREAMS = (
    _stream("multi30k", DIRECTIONS[:2], "captions from English to German, then to French"),
    _stream("multi30k_6", DIRECTIONS, "captions in all six directions of English, German and French"),
)
