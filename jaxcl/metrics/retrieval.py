"""Retrieval: hits, recall, reciprocal rank, gain; and the matrix numbers of a growing corpus.

Card refine-align/retrieval-lifelong. Corpora are counted from 0: corpus 0 is indexed before the first stage of the
protocol of DSI++ (Mehta et al. 2023, arXiv 2212.09744), whose normalisers are known second-hand.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.errors import RequestError
from jaxcl.metrics.info import Found, Info, mean
from jaxcl.metrics.matrix import explain, make_scores

CARD = "refine-align/retrieval-lifelong"
_LISTS = ("ranked documents of every query",)
_CORPORA = ("one matrix row and column a corpus",)
INFO = (
    Info(name="hits_at_k", kind="retrieval", card=CARD, papers="DSI++ (k = 1, 10)", needs=_LISTS,
         convention="share of queries with a relevant document among the first k"),
    Info(name="recall_at_k", kind="retrieval", card=CARD, papers="MixLoRA-DSI (k = 10), DPR", needs=_LISTS,
         convention="mean over queries of the share of their relevant documents among the first k"),
    Info(name="mrr_at_k", kind="retrieval", card=CARD, papers="MS MARCO (k = 10)", needs=_LISTS,
         convention="mean over queries of 1 / rank of the first relevant document, 0 beyond k"),
    Info(name="ndcg_at_k", kind="retrieval", card=CARD, papers="Jarvelin and Kekalainen 2002, trec_eval", needs=_LISTS,
         convention="gain / log2(1 + rank) over the first k, divided by that of the best order; gains as graded"),
    Info(name="corpora_a_n", kind="retrieval", card=CARD, papers="DSI++, MixLoRA-DSI (tables)", needs=_CORPORA,
         convention="mean over corpora o<=n of P[n,o]"),
    Info(name="corpora_f_n", kind="retrieval", card=CARD, papers="DSI++", needs=_CORPORA, lower_is_better=True,
         convention="(1/n) sum over o<n of max over o'<n of P[o',o] - P[n,o] (= fgt_max)"),
    Info(name="corpora_la_n", kind="retrieval", card=CARD, papers="DSI++", needs=_CORPORA,
         convention="(1/n) sum over o=1..n of P[o,o] (= learning_accuracy_without_first)"),
    Info(name="corpora_a_n_over_n", kind="retrieval", card=CARD, papers="MixLoRA-DSI (formula)", needs=_CORPORA,
         convention="corpora_a_n's sum over n + 1 corpora divided by n: a misprint, kept to compare"),
)  # fmt: skip


def first_rank(ranked: Sequence[Hashable], relevant: Collection[Hashable]) -> int | None:
    """1-based rank of the first relevant document, None where none was returned."""
    return next((rank for rank, document in enumerate(ranked, 1) if document in relevant), None)


def _up_to(k: int) -> int:
    if k < 1:
        raise RequestError(f"k={k} of a ranked list; accepted: at least 1")
    return k


def hits_at(ranks: Sequence[int | None], k: int) -> float:
    """ranks: `first_rank` of every query. With one relevant document a query this is also recall at k."""
    _up_to(k)
    return mean([float(rank is not None and rank <= k) for rank in ranks], "queries")


def mrr_at(ranks: Sequence[int | None], k: int) -> float:
    """Mean reciprocal rank, 0 for queries whose first relevant document comes after k."""
    _up_to(k)
    return mean([1 / rank if rank is not None and rank <= k else 0.0 for rank in ranks], "queries")


def recall_at(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Of one query; RequestError where nothing is relevant, for which there is no recall."""
    if not relevant:
        raise RequestError("recall of a query without a relevant document; accepted: at least one")
    return len(set(ranked[: _up_to(k)]) & set(relevant)) / len(set(relevant))


def ndcg_at(ranked: Sequence[Hashable], gains: Mapping[Hashable, float], k: int) -> float:
    """Of one query; gains: the graded relevance of its documents, others 0. RequestError where no gain is positive."""
    best = sorted((gain for gain in gains.values() if gain > 0), reverse=True)[: _up_to(k)]
    if not best:
        raise RequestError("gain of a query without a relevant document; accepted: at least one")
    if len(set(ranked[:k])) < len(ranked[:k]):
        raise RequestError("a ranked list has a document twice; accepted: every document once")
    return _discounted([max(0.0, gains.get(document, 0.0)) for document in ranked[:k]]) / _discounted(best)


def _discounted(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(1 + rank) for rank, gain in enumerate(gains, 1)))


def corpora(P: Any) -> dict[str, Found]:
    """Of P[n, o] (f[n+1, n+1], higher is better): the metric on corpus o with all documents seen after stage n."""
    scores = make_scores(P)
    found = explain(scores)
    total, n = float(np.sum(scores.final)), scores.last
    return {
        "corpora_a_n": found["aa"],
        "corpora_f_n": found["fgt_max"],
        "corpora_la_n": found["learning_accuracy_without_first"],
        "corpora_a_n_over_n": (total / n, None) if n and np.isfinite(total) else (None, "undefined: n is 0"),
    }
