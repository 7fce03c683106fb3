"""A corpus in slices: documents to learn by their ids, and queries to find them. Card refine-align/retrieval-lifelong.

Cranfield: ``retrieval/cranfield/{docs,queries}.jsonl.gz`` in the data directory, rows of the ``retrieval`` schema. As
in DSI++ (Mehta et al. 2022, arXiv 2212.09744) a stage indexes a slice by mapping each document's text to its id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.errors import RequestError, unknown

Row = dict[str, Any]
BY = ("id", "year")


def corpus(name: str, data_dir: str | Path | None = None) -> tuple[list[Row], list[Row]]:
    """(documents, queries) of ``retrieval/<name>``. RequestError: no such files, malformed rows, a query in the
    documents' file or the other way round."""
    folder = data_folder("retrieval", data_dir) / name
    parts = []
    for file, field in (("docs", "text"), ("queries", "query")):
        rows = read_rows(folder / f"{file}.jsonl.gz", "retrieval")
        for row in rows:
            if row.get(field) is None:
                raise RequestError(f"{folder / file}.jsonl.gz: row {row['id']!r} has no {field!r}; accepted: {file}")
        parts.append(rows)
    return parts[0], parts[1]


def sliced(docs: Sequence[Row], names: Sequence[str], by: str = "id") -> dict[str, list[Row]]:
    """{slice: documents}, as equal in size as they can be, cut in the file's order ('id') or by 'year'; documents of
    one year stay in the file's order, those without a year come first. RequestError: fewer documents than slices."""
    if by not in BY:
        raise unknown("way to cut a corpus", by, BY)
    if len(docs) < len(names):
        raise RequestError(f"{len(docs)} documents for {len(names)} slices; accepted: at least one each")
    line = list(docs) if by == "id" else sorted(docs, key=lambda d: d.get("year") or "")
    cuts = [i * len(line) // len(names) for i in range(len(names) + 1)]
    return {name: line[a:b] for name, a, b in zip(names, cuts, cuts[1:])}


def asked_of(slices: Mapping[str, Sequence[Row]], queries: Sequence[Row]) -> tuple[dict[str, list[Row]], list[str]]:
    """({slice: its queries}, ids of relevant documents that are not there). ``slices``: in the order they are learned.

    A query belongs to the latest slice that holds one of its relevant documents: from then on all of them can be found
    (CorpusBrain++, arXiv 2402.16767, for queries with several sources). Relevant documents that no slice holds are
    taken out of it; a query without any is left out.
    """
    place = {doc["id"]: n for n, docs in enumerate(slices.values()) for doc in docs}
    out: dict[str, list[Row]] = {name: [] for name in slices}
    names, missing = list(slices), []
    for query in queries:
        there = [doc for doc in query["relevant"] if doc in place]
        missing += [doc for doc in query["relevant"] if doc not in place]
        if there:
            out[names[max(place[doc] for doc in there)]].append(query | {"relevant": there})
    return out, missing


def document_row(doc: Row) -> Row:
    """A document as an ``instruct`` row: its text, answered by its id."""
    return {"id": doc["id"], "task": "document", "instruction": "Document: ", "input": doc["text"], "target": doc["id"]}


def query_row(query: Row) -> Row:
    """A query as an ``instruct`` row; every relevant document's id is right."""
    right = list(query["relevant"])
    asked = {"task": "query", "instruction": "Query: ", "input": query["query"]}
    return {"id": query["id"], **asked, "target": right[0], "targets": right, "relevant": right}
