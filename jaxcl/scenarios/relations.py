"""Continual relation extraction: new relations at every stage, compared with all that were seen. Scenario 6.

FewRel in eight stages of ten relations, as few-shot work cuts it, or in ten of eight (Wang et al. 2019, arXiv
1903.02588).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.classes import Groups, class_incremental, grouped, of_group
from jaxcl.scenarios.keeping import whole
from jaxcl.scenarios.reading import Row, cleaned

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

FOLDER = "relation_extraction/fewrel"
PER_CLASS = 10
FEWSHOT = "relations/fewrel_fewshot"


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.relations import relation_rows

    settings.known(info, "per_class", *(["shots"] if info.name == FEWSHOT else []))
    if info.name == FEWSHOT:  # the first cluster has more rows: it comes first in every order
        stages = [info.stages[0], *(stage for stage in stages if stage != info.stages[0])]
    all_groups = _groups(info, settings)
    groups = {stage: all_groups[stage] for stage in stages}
    test = of_group(relation_rows("test", settings.data_dir), groups)
    train, notes = cleaned(of_group(_train(info, settings), groups), test, lambda row: row["input"], settings)
    per_class = whole(settings, "per_class", PER_CLASS, 0)
    return class_incremental(info, groups, train, test, tokenizer, settings, per_class=per_class, notes=notes)


def _train(info: StreamInfo, settings: Settings) -> list[Row]:
    from jaxcl.data.relations import relation_rows

    split = f"train_fewshot{settings.option('shots', 5, (5, 10))}" if info.name == FEWSHOT else "train_union"
    return relation_rows(split, settings.data_dir)


def _groups(info: StreamInfo, settings: Settings) -> Groups:
    """{stage: its relations}: the clusters, or groups of one size from an order that the seed draws."""
    from jaxcl.data.relations import clusters

    found = clusters(settings.data_dir)
    if info.stages[0].startswith("cluster"):
        return dict(zip(info.stages, found, strict=True))
    return grouped(info.stages, [name for group in found for name in group], settings.seed)


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    classes = set(_groups(info, settings)[stage])
    return [row["input"] for row in _train(info, settings) if row["target"] in classes]


def _stream(name: str, stages: Sequence[str], unit: str, doc: str) -> StreamInfo:
    return StreamInfo(
        name=name,
        scenario="relation extraction",
        stages=tuple(stages),
        metric="accuracy over all relations seen (label ranking)",
        regime="CIL",
        card="cft/continual-relation-extraction",
        doc=doc,
        unit=unit,
        keeps=f"option per_class rows of each relation, {PER_CLASS} by default, counted in total",
        protocol="the test rows of every stage after each stage; candidates are all relations seen so far",
        public=("hf:thunlp/few_rel", "github:qcwthu/Continual_Fewshot_Relation_Learning"),
        data=(FOLDER,),
        build=_build,
        texts=_texts,
    )


_CLUSTERS = [f"cluster_{n}" for n in range(1, 9)]
STREAMS = (
    _stream("relations/fewrel", _CLUSTERS, "ten relations", "80 relations, 36 to 100 rows each"),
    _stream(
        "relations/fewrel_10x8",
        [f"relations_{n:02}" for n in range(1, 11)],
        "eight relations",
        "80 relations in an order drawn by seed, ten stages",
    ),
    _stream(
        FEWSHOT,
        _CLUSTERS,
        "ten relations",
        "the first cluster, always first, has about 100 rows a relation; the others 5 or 10 (option shots)",
    ),
)
