"""Model editing's numbers: the card's worked examples, the oracle's, and the card's invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracle import oracle

from jaxcl.errors import RequestError
from jaxcl.metrics.editing import (
    average,
    counterfact,
    edit_matrix,
    exact_match,
    ood_generality,
    retention_by_age,
    stream,
    token_match,
    unlearning,
    upstream,
)
from jaxcl.metrics.matrix import cl_metrics

EDITS = [[1.0], [0.8, 1.0], [0.6, 1.0, 0.9]]


def test_the_cards_worked_examples():
    """By hand: per-token matches, a stream of three edits, upstream data, CounterFact's pairs."""
    sets = {
        "Rel": [[1, 1], [1, 0, 1], [0, 0], [1]],
        "Gen": [[1, 1], [0, 0, 1], [0, 0], [1]],
        "Loc": [[1, 1, 1], [1, 1], [1, 0], [1, 1, 1, 1]],
    }
    assert [token_match(m) for m in sets.values()] == pytest.approx([2 / 3, 7 / 12, 0.875])
    assert [exact_match(m) for m in sets.values()] == [0.5, 0.5, 0.75]
    assert average(0.5, 0.5, 0.75) == pytest.approx(0.583333333, abs=1e-9)
    seen = stream(EDITS)
    assert seen.edit_success == [1.0, 1.0, 0.9] and seen.retention == pytest.approx([1.0, 0.9, 2.5 / 3])
    assert upstream((1, 1, 0, 1), (1, 0, 0, 1)) == (0.5, -0.25)
    found = counterfact([(0.6, 0.2), (0.3, 0.5)], [(0.4, 0.3), (0.2, 0.6)], [(0.1, 0.5), (0.3, 0.25)])
    assert found == pytest.approx({"ES": 0.5, "PS": 0.5, "NS": 0.5, "EM": 0.1, "PM": -0.15, "NM": 0.175, "S": 0.5})
    assert counterfact([(0.1, 0.2)], [(0.4, 0.3)], [(0.1, 0.5)])["S"] == 0.0


def test_the_oracle_file_has_the_same_numbers():
    o = oracle("editing")
    for side, key in (("Rel", "token_match_edit"), ("Gen", "token_match_rephrase"), ("Loc", "loc_same")):
        assert token_match(o[key]) == pytest.approx(o[f"{side}_token"], abs=1e-6)
        assert exact_match(o[key]) == pytest.approx(o[f"{side}_exact"], abs=1e-6)
    assert average(o["Rel_exact"], o["Gen_exact"], o["Loc_exact"]) == pytest.approx(o["Avg_exact"], abs=1e-6)
    seen, after = stream(o["edit_matrix"]), upstream(o["upstream_before"], o["upstream_after"])
    assert seen.edit_success == pytest.approx(o["ES_per_edit"], abs=1e-6)
    assert seen.retention == pytest.approx(o["ERR_per_edit"], abs=1e-6)
    assert after == pytest.approx((o["TRR_metric"], o["TRR_drop"]), abs=1e-6)
    assert (after.retention + seen.retention[-1]) / 2 == pytest.approx(o["avg_TRR_ERR"], abs=1e-6)
    pairs = o["counterfact_pairs_new_old"]
    found = counterfact(pairs["rewrite"], pairs["paraphrase"], pairs["neighborhood"])
    assert all(found[k] == pytest.approx(pairs[k], abs=1e-6) for k in ("ES", "EM", "PS", "NS", "NM"))
    assert found["S"] == pytest.approx(pairs["S_harmonic"], abs=1e-6)


def test_retention_by_the_age_of_an_edit():
    assert retention_by_age(EDITS) == pytest.approx([(1.0 + 1.0 + 0.9) / 3, (0.8 + 1.0) / 2, 0.6])
    R = edit_matrix(EDITS)
    assert np.isnan(R[0, 1:]).all() and R[2].tolist() == EDITS[2]
    found = cl_metrics(R)  # edits as tasks: nothing is known of an edit before it is made
    assert found["fgt_diag"] == pytest.approx(((1.0 - 0.6) + (1.0 - 1.0)) / 2)
    assert found["aa"] == pytest.approx(stream(EDITS).retention[-1]) and found["fgt_max"] is None
    with pytest.raises(RequestError, match="1 scores after edit 1; accepted: 2"):
        edit_matrix([[1.0], [1.0]])


def test_generality_in_other_text_and_unlearning():
    limit = -math.log(0.8)
    assert ood_generality([limit - 1e-6, limit + 1e-6, 0.0, 5.0]) == 0.5
    found = unlearning([0.9, 0.1, 0.7, 0.0], [False, True, False, True])
    assert found.forgotten == (pytest.approx(0.05), None) and found.retained == (pytest.approx(0.8), None)
    assert unlearning([0.9], [False]).forgotten == (None, "undefined: no fact was removed")
    assert unlearning([0.9], [True]).retained[0] is None
    with pytest.raises(RequestError, match="2 recalls of 1 facts"):
        unlearning([1.0, 0.0], [True])


@pytest.mark.parametrize("seed", range(10))
def test_invariants(seed):
    rng = np.random.default_rng(seed)
    sets = [[rng.integers(0, 2, rng.integers(1, 6)).tolist() for _ in range(5)] for _ in range(3)]
    for matches in sets:
        assert exact_match(matches) <= token_match(matches) + 1e-12
        order = rng.permutation(5)
        assert token_match([matches[i] for i in order]) == pytest.approx(token_match(matches))
    three = [token_match(m) for m in sets]
    assert min(three) <= average(*three) <= max(three)
    same = rng.integers(0, 2, 7)
    assert upstream(same, same).drop == 0.0  # an unedited model
    assert exact_match([[1, 1], [1]]) == token_match([[1, 1], [1]]) == 1.0
    with pytest.raises(RequestError, match="no edits; accepted: at least one"):
        token_match([])
