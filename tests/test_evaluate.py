"""Text scores against numpy, packing against separate rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from byte_model import WIDTH, Bytes, Logits, make_logits, make_view

from jaxcl.core.types import Stream
from jaxcl.core.view import View
from jaxcl.data.pipeline import pipeline
from jaxcl.data.stage import instruct_source, text_source
from jaxcl.errors import RequestError
from jaxcl.evaluate.nll import text_nll, token_hits, window_ids


@pytest.fixture(scope="module")
def view() -> View:
    return make_view(layers=2)


@pytest.fixture(scope="module")
def logits(view) -> Logits:
    return make_logits(view)


def rows(n: int) -> list[dict]:
    return [
        {
            "task": "t",
            "id": str(i),
            "instruction": f"Continue {i}.\n",
            "input": "ab" * (i * 3),
            "target": "?" * 7,
        }
        for i in range(n)
    ]


TEXTS = ["A first text, of some length.", "b", "ünïcode 世界", "the end " * 9]


def test_windows_overlap_by_one_token():
    assert window_ids([1, 2, 3, 4, 5], 9, 3) == [[9, 1, 2], [2, 3, 4], [4, 5]]
    assert window_ids([1, 2], 9, 3) == [[9, 1, 2]]


@pytest.mark.parametrize("metric", ["nll", "bits_per_byte", "accuracy"])
@pytest.mark.parametrize("window", [17, 80])
def test_text_scores_equal_numpy(view, logits, metric, window):
    documents = [{"id": f"d{i}", "text": t} for i, t in enumerate(TEXTS)]
    made = text_nll("held", documents, Bytes(), window=window, batch_size=3, metric=metric)
    items = made.run(view, lambda *_: None)
    for item, text in zip(items, TEXTS):
        ids, nll, hits = [256, *text.encode()], [], []
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            z = logits(part)[:-1]
            z = z - z.max(-1, keepdims=True)
            nll += list(np.log(np.exp(z).sum(-1)) - z[np.arange(len(part) - 1), part[1:]])
            hits += list(z.argmax(-1) == np.array(part[1:]))
        assert len(nll) == len(text.encode())
        expected = {
            "nll": np.mean(nll),
            "bits_per_byte": np.sum(nll) / math.log(2) / len(text.encode()),
            "accuracy": np.mean(hits),
        }[metric]
        assert item["score"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert made.higher_is_better == (metric == "accuracy") and made.n == 4
    assert math.isinf(made.range[1]) == (metric != "accuracy")


def test_next_token_hits_across_chunks(view, logits):
    ids = np.random.default_rng(0).integers(0, 256, (2, 70)).astype(np.int32)
    best = np.stack([logits(row.tolist()).argmax(-1) for row in ids])
    ids[:, 1:][:, ::2] = best[:, :-1][:, ::2]  # some right, though what follows them changes
    ones = np.ones_like(ids)
    batch = {"tokens": ids, "segments": ones, "positions": np.tile(np.arange(70, dtype=np.int32), (2, 1))}
    expected = np.stack([logits(row.tolist()).argmax(-1) for row in ids])[:, :-1] == ids[:, 1:]
    got = np.asarray(view.call(token_hits, batch))
    assert got.shape == (2, 70) and not got[:, 0].any() and expected.any() and not expected.all()
    np.testing.assert_array_equal(got[:, 1:], expected)


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        ({"metric": "ppl"}, "unknown metric of held-out text 'ppl'; accepted: accuracy, bits_per_byte, "),
        ({"window": 1}, "window=1; accepted: at least 2 tokens"),
        ({"documents": [{"id": "x", "text": ""}]}, "row 'x' has no text"),
        ({"documents": []}, "no test rows"),
    ],
)
def test_text_scores_refuse(kw, words):
    kw = {"documents": [{"id": "d", "text": "x"}], "window": 16, **kw}
    with pytest.raises(RequestError, match=words):
        text_nll("held", kw.pop("documents"), Bytes(), **kw)


def nll_of(view, batch):
    return np.asarray(
        view.call(plain_nll, {k: v for k, v in batch.items() if k not in ("source", "stage", "row", "rows")})
    )


def plain_nll(apply, head, spec, params, batch):
    return apply(spec, params, batch).nll


def test_packed_rows_have_the_nll_they_have_alone(view):
    source = instruct_source("s", rows(8), Bytes(), window=WIDTH)
    streams = (Stream(0, np.arange(8)),)
    how = {"stage": 0, "batch_size": 4, "seed": 0}
    k, alone = source[0]["weight"].shape[0], {}
    for batch in pipeline([source], streams, steps=2, **how):
        alone |= dict(zip(batch["row"].tolist(), nll_of(view, batch) * batch["weight"]))
    seen, shared = set(), 0
    for batch in pipeline([source], streams, steps=2, pack=3, **how):
        nll = nll_of(view, batch) * batch["weight"]
        shared += ((batch["rows"] >= 0).sum(-1) > 1).sum()
        for i, members in enumerate(batch["rows"].tolist()):
            for slot, row in enumerate(members):
                if row >= 0:
                    np.testing.assert_allclose(nll[i, slot * k : (slot + 1) * k], alone[row], atol=1e-4)
                    seen.add(row)
    assert seen == set(alone) == set(range(8)) and shared > 1


def test_masked_text_rows_and_first_tokens_have_no_weight(view):
    source = text_source("book", ["some words to read " * 20], Bytes(), window=WIDTH)
    (batch,) = pipeline(
        [source], (Stream(0, np.arange(len(source))),), stage=0, batch_size=6, steps=1, seed=0
    )
    nll = nll_of(view, batch)
    assert nll.shape == batch["weight"].shape == (6, WIDTH)
    assert (batch["row"] < 0).sum() == 6 - len(source) and not batch["weight"][batch["row"] < 0].any()
    # as many targets as tokens that follow another one of their block
    assert batch["weight"].sum() == 20 * 19 + 1 - len(source)
    assert (nll[batch["weight"] > 0] > 0).all()
