"""Retrieval without training: documents and queries as mean hidden states, the nearest by cosine.

The index grows with the stages; appending never changes a document's score, for vectors do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Params
from jaxcl.data.encode import begun, encode_text
from jaxcl.data.pipeline import stack
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Eval, Progress, bucket, grouped, shared
from jaxcl.evaluate.retrieval import DEPTH, SCORES, At, Ranked, candidates, check_queries, ranked_evals

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


def dense_retrieval(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    index: Index,
    *,
    docs_at: At | None = None,
    stage: int = 0,
    by: Sequence[str] = tuple(SCORES),
    role: str = "task",
) -> list[Eval]:
    """Documents by the cosine of their vector and the query's, without any training; as
    `jaxcl.evaluate.retrieval.docid_retrieval`.

    rows: {id, query, relevant}. index: shared by the evals of a stream, so that documents are encoded once.
    """
    check_queries(eval_id, rows, index.ids, docs_at, stage, by, index.batch_size)
    queries = Index({row["id"]: row["query"] for row in rows}, index.tokenizer, window=index.window)
    queries.batch_size = index.batch_size

    def run(view: Any, progress: Progress) -> Ranked:
        seen = set(candidates(view, index.ids, docs_at, stage))
        kept = [i for i, doc in enumerate(index.ids) if doc in seen]
        near = queries.vectors(view, progress) @ index.vectors(view, progress)[kept].T
        best = np.argsort(-near, axis=1, kind="stable")[:, :DEPTH]
        return [[index.ids[kept[i]] for i in row] for row in best]

    return ranked_evals(eval_id, rows, shared(run), by, role, {})


class Index:
    """Texts as vectors: mean of the last hidden states over their tokens, of length 1. texts: {id: text}, cut to
    ``window`` tokens. `vectors` f32[n, D], in the order of ``ids``, is computed once for the same weights."""

    def __init__(self, texts: dict[str, str], tokenizer: Tokenizer, *, window: int, batch_size: int = 16):
        self.ids, self.texts = list(texts), list(texts.values())
        self.tokenizer, self.window, self.batch_size = tokenizer, window, batch_size
        self.vectors = shared(self._encode)
        for name, text in texts.items():
            if not text:
                raise RequestError(f"{name!r} has no text; accepted: documents and queries that can be encoded")

    def _encode(self, view: Any, progress: Progress) -> np.ndarray:
        ids = [begun(self.tokenizer, text)[: self.window] for text in self.texts]
        found: list[np.ndarray] = [np.zeros(0)] * len(ids)
        done = 0
        for size, members in grouped([bucket(len(one), self.window) for one in ids], self.batch_size):
            batch = [encode_text(ids[i], size, pad=self.tokenizer.pad_id) for i in members]
            vectors = view.call(mean_state, stack(batch + [batch[0]] * (self.batch_size - len(batch))))
            for i, vector in zip(members, host(vectors).astype(np.float32)):
                found[i] = vector
            done += len(members)
            progress(done, len(ids))
        return np.stack(found)


def mean_state(apply: Any, head: Any, spec: Any, params: Params, batch: Batch) -> jax.Array:
    """f32[B,D]: mean of the last hidden states over each row's tokens, divided by its length."""
    inside = (batch["segments"] > 0).astype(jnp.float32)[..., None]
    hidden = apply(spec, params, batch).hidden.astype(jnp.float32)
    mean = jnp.sum(hidden * inside, axis=1) / jnp.sum(inside, axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
