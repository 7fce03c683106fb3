"""Corpus numbers from sums of parts, against sacrebleu, hand counts and closed forms, and their bootstrap."""

import gzip
import json
import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from jaxcl.errors import RequestError
from jaxcl.metrics.bootstrap import intervals
from jaxcl.metrics.matrix_file import parse_matrix, read_matrix, write_matrix
from jaxcl.metrics.pooling import POOLS, pooled
from jaxcl.metrics.predictions import predictions_path

TEXTS = ["the gunman kill police", "a cat sat on a mat", "", "two dogs run over the green grass today"]
WANTED = ["police killed the gunman", "a cat sat on my mat", "one man", "two dogs are running over green grass"]


def bleu_parts(text, wanted):
    found = BLEU(effective_order=True).sentence_score(text, [wanted])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def chrf_parts(text, wanted):
    parts = []
    for n in range(1, 7):
        plain = (text.replace(" ", ""), wanted.replace(" ", ""))
        a, b = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in plain)
        parts += [len(a), len(b), sum(min(a.count(g), b.count(g)) for g in set(a))]
    return parts


@pytest.mark.parametrize("upto", [1, 2, 3, 4])
def test_corpus_bleu_and_chrf_are_those_of_sacrebleu(upto):
    pairs = list(zip(TEXTS, WANTED))[:upto]
    texts, wanted = [t for t, _ in pairs], [[w for _, w in pairs]]
    sums = np.sum([bleu_parts(*p) for p in pairs], axis=0)
    assert float(POOLS["bleu"](sums)) == pytest.approx(BLEU().corpus_score(texts, wanted).score, abs=1e-9)
    sums = np.sum([chrf_parts(*p) for p in pairs], axis=0)
    assert float(POOLS["chrf"](sums)) == pytest.approx(CHRF().corpus_score(texts, wanted).score, abs=1e-6)


def test_micro_and_macro_f1_by_hand():
    # class a: 2 right, 1 wrong, 1 missed -> 2/3; class b: never found, 2 missed -> 0; class c does not occur
    parts = np.array([2.0, 1, 1, 0, 0, 2, 0, 0, 0])
    assert float(POOLS["f1_macro"](parts)) == pytest.approx((2 / 3 + 0) / 2)
    assert float(POOLS["f1_micro"](np.array([2.0, 1, 3]))) == pytest.approx(4 / 8)
    assert float(POOLS["f1_micro"](np.zeros(3))) == 0.0
    assert np.isnan(POOLS["f1_macro"](np.zeros(6)))
    stacked = np.stack([parts, parts * 3, np.zeros(9)])
    assert POOLS["f1_macro"](stacked)[:2] == pytest.approx([1 / 3, 1 / 3])


def test_perplexity_weighs_tokens():
    """The card's two chunks: 100 and 300 tokens of mean nll 2 and 3."""
    items = [{"score": math.exp(2.0), "parts": [200.0, 100]}, {"score": math.exp(3.0), "parts": [900.0, 300]}]
    assert pooled(items, "exp_ratio") == pytest.approx(15.642631884, abs=1e-8)
    assert pooled(items, "ratio") == pytest.approx(2.75)
    assert pooled([], "ratio") is None and pooled([{"score": math.nan}]) is None
    assert pooled([{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]) == pytest.approx(1 / 3)


def matrix_of(values, pool):
    evals = [{"id": "e", "metric": "m", "higher_is_better": True, "range": [0, None], "n": 100, "role": "task"}]
    evals[0] |= {"pool": pool} if pool else {}
    stages = [{"name": "s", "evals": ["e"]}]
    return {"schema": 1, "stages": stages, "evals": evals, "row0": [values[0]], "rows": [[values[1]]]}


def test_bootstrap_resamples_parts(tmp_path):
    """A ratio of sums: its interval is that of the delta method, not that of the mean of the items' own ratios."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 50, 100).astype(float)
    amount = count * rng.normal(3.0, 0.5, (2, 100))
    cells = amount.sum(1) / count.sum()
    write_matrix(tmp_path / "matrix.json", matrix_of(cells, "ratio"))
    (tmp_path / "predictions").mkdir()
    for k in range(2):
        rows = [{"id": str(i), "prediction": None, "score": 0.0, "parts": [amount[k, i], count[i]]} for i in range(100)]
        with gzip.open(predictions_path(tmp_path, "e", k), "wt") as f:
            f.write("".join(json.dumps(r) + "\n" for r in rows))
    found, reason = intervals(read_matrix(tmp_path), tmp_path)
    assert reason is None
    lo, hi = found["aa"]
    spread = np.sqrt(np.sum((amount[1] - cells[1] * count) ** 2)) / count.sum()
    assert lo < cells[1] < hi and (hi - lo) / (2 * 1.96) == pytest.approx(spread, rel=0.1)


def test_pool_of_a_matrix_is_checked():
    with pytest.raises(RequestError, match=r"evals\[0\].pool is 'mean'; accepted: ratio"):
        parse_matrix(matrix_of([1.0, 1.0], "mean"), "m.json")
    assert parse_matrix(matrix_of([1.0, 1.0], "ratio"), "m.json").evals[0].pool == "ratio"
