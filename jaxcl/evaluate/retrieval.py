"""Retrieval by writing: the model answers a query with ids of documents (DSI). Card refine-align/retrieval-lifelong.

Candidates are always all documents seen so far, whatever slice of the corpus a query is about: a growing corpus makes
old queries harder, and that belongs to the number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.data.encode import check_frames, fit_prompt, target_ids
from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval, Item, Progress, bucket, check_items, grouped, shared, stage_of
from jaxcl.evaluate.beams import search, trie, widest
from jaxcl.metrics.retrieval import first_rank, recall_at

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Ranked = list[list[str]]
"""Of every query the ids of its documents, best first."""
At = Callable[[int], Sequence[str]]
DEPTH = 10
"""Documents that are returned: as deep as the metrics look, and the beam of the references."""


def _reciprocal(ranked: Sequence[str], relevant: Sequence[str]) -> float:
    rank = first_rank(ranked[:DEPTH], relevant)
    return 1 / rank if rank else 0.0


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "hits_at_1": lambda ranked, relevant: float(first_rank(ranked[:1], relevant) is not None),
    "hits_at_10": lambda ranked, relevant: float(first_rank(ranked[:DEPTH], relevant) is not None),
    "recall_at_10": lambda ranked, relevant: recall_at(ranked, relevant, DEPTH),
    "mrr_at_10": _reciprocal,
}


def docid_retrieval(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    docs: Sequence[str],
    docs_at: At | None = None,
    stage: int = 0,
    beams: int = DEPTH,
    template: Template | None = None,
    batch_size: int = 16,
    by: Sequence[str] = tuple(SCORES),
    role: str = "task",
) -> list[Eval]:
    """Document ids as the model's answers to queries, by beam search among the ids that exist (`jaxcl.evaluate.beams`);
    ids ``eval_id/hits_at_1``, ..., from one pass.

    rows: ``instruct`` rows, whose input is the query, with ``relevant`` ids. docs: the ids of the whole stream.
    docs_at: those seen until a stage (default: all); the stage is the run's present one, at least the eval's ``stage``.
    RequestError: no rows, an unknown metric, a relevant id that is no document or, for all of a row, not seen yet.
    """
    check_queries(eval_id, rows, docs, docs_at, stage, by, batch_size)
    if beams < 1:
        raise RequestError(f"eval {eval_id!r}: beams={beams}; accepted: a positive integer")
    template = template or Template()
    ids = {doc: target_ids({"target": doc}, template, tokenizer) for doc in docs}
    room = window - max(map(len, ids.values()))
    check_frames(rows, [room] * len(rows), template, tokenizer)
    prompts: list[list[int]] = []

    def run(view: Any, progress: Progress) -> Ranked:
        if not prompts:
            prompts.extend(fit_prompt(row, template, tokenizer, room) for row in rows)
        root = trie((doc, ids[doc]) for doc in candidates(view, docs, docs_at, stage))
        how = {"beams": beams, "batch_size": batch_size, "width": bucket(widest(root), 1 << 30)}
        found: Ranked = [[] for _ in rows]
        done = 0
        for size, members in grouped([bucket(len(p), room) for p in prompts], batch_size):
            for i, ranked in zip(members, search(view, [prompts[i] for i in members], size, root, **how)):
                found[i] = [doc for doc, _ in ranked]
            done += len(members)
            progress(done, len(rows))
        return found

    return ranked_evals(eval_id, rows, shared(run), by, role, {"beams": beams})


def candidates(view: Any, docs: Sequence[str], docs_at: At | None, stage: int) -> Sequence[str]:
    """The documents that may be returned."""
    return docs if docs_at is None else docs_at(stage_of(view, stage))


def check_queries(
    eval_id: str, rows: Sequence[dict], docs: Sequence[str], docs_at: At | None, stage: int, by: Any, batch_size: int
) -> None:
    """RequestError where queries, documents and metrics do not fit each other."""
    check_items(eval_id, rows, batch_size)
    for name in by:
        if name not in SCORES:
            raise unknown("retrieval metric", name, SCORES)
    known, seen = set(docs), set(docs if docs_at is None else docs_at(stage))
    for doc in seen - known:
        raise unknown("document", doc, known, where=f"docs_at({stage}) of eval {eval_id!r}")
    for row in rows:
        for doc in row["relevant"]:
            if doc not in known:
                raise unknown("document", doc, known, where=f"query {row['id']!r} of eval {eval_id!r}")
        if not seen & set(row["relevant"]):
            raise RequestError(f"eval {eval_id!r}: query {row['id']!r} has no relevant document at stage {stage}")


def ranked_evals(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    once: Callable[[Any, Progress], Ranked],
    by: Sequence[str],
    role: str,
    hparams: dict[str, Any],
) -> list[Eval]:
    """An eval for each metric over ranked documents; its predictions are their ids, a line each."""

    def runner(name: str) -> Callable[[Any, Progress], list[Item]]:
        def run(view: Any, progress: Progress) -> list[Item]:
            return [
                {"id": row["id"], "prediction": "\n".join(ranked), "score": SCORES[name](ranked, row["relevant"])}
                for row, ranked in zip(rows, once(view, progress), strict=True)
            ]

        return run

    return [Eval(f"{eval_id}/{name}", name, len(rows), runner(name), role=role, hparams=hparams) for name in by]
