"""A growing corpus: documents are learned by their ids, slice by slice, and queries look for them. Scenario 11."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

SLICES = tuple(f"slice_{n}" for n in range(1, 6))
RETRIEVERS = ("docid", "dense")
Rows = dict[str, list[dict[str, Any]]]


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.leaks import check
    from jaxcl.data.retrieval import asked_of, document_row

    settings.known(info, "by", "retriever", "keep")
    slices, queries = _cut(stages, settings)
    asked, missing = asked_of(slices, queries)
    texts = [{name: {r["id"]: r[field] for r in rows} for name, rows in part.items()}
             for part, field in ((slices, "text"), (asked, "query"))]  # fmt: skip
    leaks = check(*texts, near=True, allow=settings.allow)
    rows = {name: [document_row(doc) for doc in docs] for name, docs in slices.items()}
    made = instruct_stages(rows, tokenizer, window=settings.window, template=settings.template)
    evals: list[Eval] = []
    for n, tested in enumerate(_evals(slices, asked, tokenizer, settings)):
        made[n] = dataclasses.replace(made[n], evals=tuple(e.id for e in tested[:1]))
        evals += [*tested[:1], *(dataclasses.replace(e, role="probe") for e in tested[1:])]
    notes = {"leaks": leaks, "judgements of documents that are not in the corpus": len(missing)}
    return Scenario(info, made, evals, share_of(made, settings, 0.0), {k: v for k, v in notes.items() if v})


def _cut(stages: Sequence[str], settings: Settings) -> tuple[Rows, list[dict[str, Any]]]:
    """The corpus in slices, in the order of the stages, and all queries. ``rows`` draws by seed the documents of a
    slice, at first those that answer some query: else a small corpus would have no queries."""
    from jaxcl.data.retrieval import BY, corpus, sliced
    from jaxcl.data.stage import subsample

    docs, queries = corpus("cranfield", settings.data_dir)
    cut = sliced(docs, sorted(stages), settings.option("by", "id", BY))
    if settings.rows is None:
        return {name: cut[name] for name in stages}, queries
    wanted = {doc for query in queries for doc in query["relevant"]}
    out: Rows = {}
    for name in stages:
        found, other = ([d for d in cut[name] if (d["id"] in wanted) == is_wanted] for is_wanted in (True, False))
        kept = subsample(found, settings.rows, settings.seed) if found else []
        left = settings.rows - len(kept)
        chosen = {d["id"] for d in [*kept, *(subsample(other, left, settings.seed) if left else [])]}
        out[name] = [doc for doc in cut[name] if doc["id"] in chosen]
    return out, queries


def _evals(
    slices: Mapping[str, Sequence[dict[str, Any]]], asked: Rows, tokenizer: Tokenizer, settings: Settings
) -> list[list[Eval]]:
    """Of every slice the evals of its queries, Hits@1 first; the candidates are all documents learned so far."""
    from jaxcl.data.retrieval import query_row
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.dense import Index, dense_retrieval
    from jaxcl.evaluate.retrieval import docid_retrieval

    texts = {doc["id"]: doc["text"] for docs in slices.values() for doc in docs}
    seen: list[list[str]] = []
    for docs in slices.values():
        seen.append([*(seen[-1] if seen else ()), *(doc["id"] for doc in docs)])
    size: dict[str, Any] = {"window": settings.window, "batch_size": settings.batch_size}
    dense = settings.option("retriever", "docid", RETRIEVERS) == "dense"
    index = Index(texts, tokenizer, **size) if dense else None
    out: list[list[Eval]] = []
    for n, (name, queries) in enumerate(asked.items()):
        rows = subsample([query_row(query) for query in queries], settings.test_rows, settings.seed)
        where: dict[str, Any] = {"docs_at": lambda stage: seen[min(stage, len(seen) - 1)], "stage": n}
        if not rows:
            out.append([])
        elif index is not None:
            out.append(dense_retrieval(name, [r | {"query": r["input"]} for r in rows], index, **where))
        else:
            how = {"docs": list(texts), "template": settings.template, **size, **where}
            out.append(docid_retrieval(name, rows, tokenizer, **how))
    return out


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    return [doc["text"] for doc in _cut(info.stages, settings)[0][stage]]


STREAMS = (
    StreamInfo(
        name="retrieval/cranfield",
        scenario="retrieval",
        stages=SLICES,
        metric="Hits@1; Hits@10, Recall@10, MRR@10 beside",
        regime="DIL",
        card="refine-align/retrieval-lifelong",
        doc="1,398 abstracts on aerodynamics in five slices; a query is of the latest slice with a relevant document",
        unit="a slice of the corpus, by id or by year (option by): documents, answered by their ids",
        keeps="nothing (option keep: a share of the documents); queries are never kept",
        protocol="every slice's queries after each stage, over all documents so far; option retriever=dense: untrained",
        public=("github:oussbenk/cranfield-trec-dataset",),
        data=("retrieval/cranfield",),
        build=_build,
        texts=_texts,
    ),
)
