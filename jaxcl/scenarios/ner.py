"""Continual named entity recognition, answers in words (``type: surface; type: surface``). Scenario 5.

Domain-incremental over CrossNER and two biomedical sets, or type-incremental in one domain: there a stage annotates its
own types alone, entities of old and of future types count as none (Monaikul et al. 2021; CFNER, arXiv 2210.03980).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.classes import seen
from jaxcl.scenarios.reading import Row, cleaned, examples, present, whole

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

DOMAINS = "conll2003 politics science music ai ncbi_disease bc5cdr".split()
PER_CLASS = 10
TYPES: dict[str, dict[str, tuple[str, ...]]] = {
    "conll2003": {name: (name,) for name in ("person", "location", "organisation", "misc")},
    "politics": {  # base 3, increment 2, in alphabetical order
        "country-election-event": ("country", "election", "event"),
        "location-misc": ("location", "misc"),
        "organisation-person": ("organisation", "person"),
        "politicalparty-politician": ("politicalparty", "politician"),
    },
}
QUESTION = "List the named entities with their types.\n"


def _domains(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    """One domain a stage, all its types annotated; the question names them, as it would for a user of that domain."""
    from jaxcl.data.ner import ner_rows, types_of

    settings.known(info, "per_class")
    test = {stage: ner_rows(stage, "test", settings.data_dir) for stage in stages}
    train = {stage: ner_rows(stage, "train", settings.data_dir) for stage in stages}
    train, notes = cleaned(train, test, _sentence, settings, drop=("test-in-train",))
    types = {stage: types_of([*train[stage], *test[stage]]) for stage in stages}
    asked = {stage: f"List the named entities of the types {', '.join(types[stage])}.\n" for stage in stages}
    evals = {
        stage: _evals(stage, _drawn(test[stage], settings.test_rows, settings), asked[stage], tokenizer, settings)
        for stage in stages
    }
    keeps = examples(whole(settings, "per_class", PER_CLASS) * sum(map(len, types.values())))
    return _scenario(info, train, asked, evals, keeps, tokenizer, settings, notes)
