"""Ids found by beam search against brute force over all of them; dense vectors against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from byte_model import WIDTH, Bytes, log_softmax, make_logits, make_view, prompt_of

from jaxcl.core.types import Clock
from jaxcl.errors import RequestError
from jaxcl.evaluate.beams import search, trie, widest
from jaxcl.evaluate.dense import Index, dense_retrieval
from jaxcl.evaluate.retrieval import SCORES, docid_retrieval
from jaxcl.metrics.pooling import pooled

DOCS = [*map(str, range(1, 13)), "120", "12 b"]
IDS = {doc: [*f" {doc}".encode(), 256] for doc in DOCS}


@pytest.fixture(scope="module")
def view():
    return make_view()


@pytest.fixture(scope="module")
def logits(view):
    return make_logits(view)


def queries(n: int = 4) -> list[dict]:
    texts = ["wings", "flow over plates", "heat", "a b"]
    return [
        {"task": "t", "id": f"q{i}", "instruction": f"Find {i}.\n", "input": texts[i], "relevant": [DOCS[i], "120"]}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def brute(logits):
    """Of every query {document: sum of the log-probabilities of its tokens}, each run whole."""
    found = []
    for row in queries():
        prompt = prompt_of(row)
        scores = {}
        for doc, ids in IDS.items():
            logp = log_softmax(logits(prompt + ids))[len(prompt) - 1 : -1]
            scores[doc] = logp[np.arange(len(ids)), ids].sum()
        found.append(scores)
    return found


def searched(view, beams: int, docs=DOCS):
    root = trie((doc, IDS[doc]) for doc in docs)
    prompts = [prompt_of(row) for row in queries()]
    assert widest(root) == 9 and root[32][ord("1")].keys() == {256, *b"012"}
    return search(view, prompts, 64, root, beams=beams, batch_size=5, width=32)


def test_as_many_beams_as_documents_find_them_all_in_order(view, brute):
    for ranked, scores in zip(searched(view, 16), brute, strict=True):
        assert [doc for doc, _ in ranked] == sorted(DOCS, key=lambda doc: -scores[doc])
        np.testing.assert_allclose([s for _, s in ranked], [scores[doc] for doc, _ in ranked], rtol=1e-4)


def test_few_beams_equal_a_beam_search_over_whole_sequences(view, logits):
    """Kept at each depth: the best two of finished ids and beginnings, as written out here without trie or cache."""
    for ranked, row in zip(searched(view, 2), queries(), strict=True):
        prompt, beams = prompt_of(row), [((), 0.0)]
        while any(b[-1:] != (256,) for b, _ in beams):
            grown = [(b, s) for b, s in beams if b[-1:] == (256,)]
            for b, s in beams:
                longer = [tuple(ids) for ids in IDS.values() if len(ids) > len(b)]
                after = {ids[: len(b) + 1] for ids in longer if ids[: len(b)] == b}
                if after:
                    logp = log_softmax(logits(prompt + list(b)))[-1]
                    grown += [(a, s + logp[a[-1]]) for a in after]
            beams = sorted(grown, key=lambda x: -x[1])[:2]
        assert [doc for doc, _ in ranked] == [bytes(b[1:-1]).decode() for b, _ in beams]
        np.testing.assert_allclose([s for _, s in ranked], [s for _, s in beams], rtol=1e-4)


def test_only_documents_seen_so_far_are_returned(view, brute):
    slices = {0: [*DOCS[:6], "120"], 2: DOCS}
    evals = docid_retrieval(
        "d", queries(), Bytes(), window=WIDTH, docs=DOCS, docs_at=slices.__getitem__, beams=20, batch_size=4
    )
    assert [e.id for e in evals] == [f"d/{name}" for name in ("hits_at_1", "hits_at_10", "recall_at_10", "mrr_at_10")]
    assert evals[0].hparams == {"beams": 20}
    for stage in (0, 2):
        view.at(view.spec, view.params, {}, {}, Clock.at(stage=stage))
        items = {e.metric: e.run(view, lambda *_: None) for e in evals}
        for i, row in enumerate(queries()):
            order = sorted(slices[stage], key=lambda doc: -brute[i][doc])
            ranks = sorted(order.index(doc) + 1 for doc in row["relevant"])
            assert items["hits_at_1"][i]["prediction"].split("\n") == order[:20]
            assert items["hits_at_1"][i]["score"] == float(ranks[0] == 1)
            assert items["hits_at_10"][i]["score"] == float(ranks[0] <= 10)
            assert items["recall_at_10"][i]["score"] == sum(r <= 10 for r in ranks) / 2
            assert items["mrr_at_10"][i]["score"] == (1 / ranks[0] if ranks[0] <= 10 else 0)
    view.at(view.spec, view.params, {}, {}, Clock.at(stage=0))
    late = docid_retrieval("d", queries(), Bytes(), window=WIDTH, docs=DOCS, docs_at=slices.__getitem__, stage=2,
                           beams=20, batch_size=4, by=("mrr_at_10",))  # fmt: skip
    assert late[0].run(view, lambda *_: None) == items["mrr_at_10"], "never fewer than at the eval's own stage"


def test_scores_by_hand():
    ranked, relevant = [str(i) for i in range(20)], ["3", "12", "99"]
    assert [SCORES[name](ranked, relevant) for name in SCORES] == [0.0, 1.0, 1 / 3, 0.25]
    assert [SCORES[name](ranked, ["12"]) for name in SCORES] == [0.0, 0.0, 0.0, 0.0]
    assert [SCORES[name](ranked, ["0"]) for name in SCORES] == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        ({"by": ("mrr_at_1",)}, "unknown retrieval metric 'mrr_at_1'; did you mean 'mrr_at_10'"),
        ({"docs": DOCS[:-2]}, "unknown document '120' in query 'q0' of eval 'd'; "),
        ({"docs_at": lambda stage: DOCS[1:5]}, "eval 'd': query 'q0' has no relevant document at stage 0"),
        ({"docs_at": lambda stage: ["x"]}, r"unknown document 'x' in docs_at\(0\) of eval 'd'"),
        ({"beams": 0}, "beams=0; accepted: a positive integer"),
        ({"rows": []}, "no test rows"),
    ],
)
def test_what_is_refused(kw, words):
    kw = {"rows": queries(), "docs": DOCS, **kw}
    with pytest.raises(RequestError, match=words):
        docid_retrieval("d", kw.pop("rows"), Bytes(), window=WIDTH, **kw)


TEXTS = {"a": "on wings .", "b": "heat in plates", "c": "wings wings", "d": "a much longer text on flow " * 4}


def test_dense_retrieval_equals_numpy_and_encodes_documents_once(view):
    hidden = jax.jit(lambda params, batch: view.model.apply(view.spec, params, batch).hidden)

    def vector(text):
        ids = list(text.encode())[:60]
        whole = np.zeros((1, 60), np.int32)  # one shape; what follows the text does not matter to what stands before
        whole[0, : len(ids)] = ids
        batch = {"tokens": whole, "segments": np.ones_like(whole), "positions": np.arange(60, dtype=np.int32)[None]}
        mean = np.asarray(hidden(view.params, batch), np.float64)[0, : len(ids)].mean(0)
        return mean / np.linalg.norm(mean)

    index = Index(TEXTS, Bytes(), window=60, batch_size=3)
    asked = [{"id": "q0", "query": "wings .", "relevant": ["b"]}, {"id": "q1", "query": "heat", "relevant": ["d"]}]
    passes = []
    one = dense_retrieval("one", asked, index, by=("mrr_at_10",))
    two = dense_retrieval("two", asked[:1], index, docs_at=lambda stage: ["b", "c"])
    view.at(view.spec, view.params, {}, {}, Clock.at())
    items = one[0].run(view, lambda done, total: passes.append(total))
    few = {e.metric: e.run(view, lambda done, total: passes.append(total)) for e in two}
    assert passes.count(4) == 2 and passes.count(1) == 1, "documents in two buckets once, one query after them"
    vectors = {name: vector(text) for name, text in TEXTS.items()}
    np.testing.assert_allclose(index.vectors(view, lambda *_: None), list(vectors.values()), atol=1e-4)
    for item, row in zip(items, asked):
        near = {name: v @ vector(row["query"]) for name, v in vectors.items()}
        order = sorted(near, key=lambda name: -near[name])
        assert item["prediction"].split("\n") == order
        assert item["score"] == 1 / (1 + order.index(row["relevant"][0]))
    order = items[0]["prediction"].split("\n")
    assert few["mrr_at_10"][0]["prediction"].split("\n") == [doc for doc in order if doc in "bc"]
    assert 0 < pooled(items) <= 1
    with pytest.raises(RequestError, match="'e' has no text"):
        Index({"e": ""}, Bytes(), window=60)
