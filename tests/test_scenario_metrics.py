"""Repetition, retrieval, tool calls, alignment: the cards' worked numbers, counting by hand, invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from oracle import oracle
from samples import R

from jaxcl.errors import RequestError
from jaxcl.metrics import alignment, knn_lm, repetition, retrieval, tools

# repetition


def test_rep_n_counts_what_comes_twice():
    assert repetition.rep_n("abcdefgh", 4) == 0.0
    for m, n in itertools.product((5, 12, 30), (1, 4)):
        assert repetition.rep_n([7] * m, n) == pytest.approx(1 - 1 / (m - n + 1))  # a constant sequence
    ids = [1, 2, 3, 1, 2, 3, 1]  # 12, 23, 31, 12, 23, 31: three distinct of six
    assert repetition.rep_n(ids, 2) == pytest.approx(0.5)
    assert repetition.repetition([ids, [1]], 2) == (pytest.approx(0.25), 1)  # the short one counts as 0, and is counted
    with pytest.raises(RequestError, match="no sequences"):
        repetition.repetition([], 4)
    with pytest.raises(RequestError, match="n=0"):
        repetition.rep_n([1], 0)


@pytest.mark.parametrize("seed", range(10))
def test_rep_n_never_rises_with_n(seed):
    ids = np.random.default_rng(seed).integers(0, 3, 40).tolist()
    values = [repetition.rep_n(ids, n) for n in range(1, 45)]
    assert all(a >= b for a, b in itertools.pairwise(values)) and min(values) >= 0 and max(values) < 1


# retrieval

RANKS = [1, 3, None, 2, 12]


def test_ranks_and_corpora_of_the_card():
    assert retrieval.hits_at(RANKS, 1) == pytest.approx(0.2)
    assert retrieval.hits_at(RANKS, 10) == pytest.approx(0.6)
    assert retrieval.mrr_at(RANKS, 10) == pytest.approx((1 + 1 / 3 + 1 / 2) / 5)
    found = retrieval.corpora(R)
    wanted = {"corpora_a_n": 0.7325, "corpora_f_n": 0.093333333, "corpora_la_n": 0.783333333,
              "corpora_a_n_over_n": 0.976666667}  # fmt: skip
    assert {k: v for k, (v, _) in found.items()} == pytest.approx(wanted, abs=1e-6)
    alone = retrieval.corpora([[0.5]])
    assert alone["corpora_a_n"] == (0.5, None) and all(alone[k][0] is None for k in list(wanted)[1:])


def test_retrieval_of_the_oracle_file():
    o = oracle("retrieval")
    ranks = o["ranks_of_first_relevant"]
    assert retrieval.hits_at(ranks, 1) == pytest.approx(o["hits_at_1"], abs=1e-6)
    single = [["x"] * 0 if rank is None else [*range(1, rank), "hit"] for rank in ranks]
    assert [retrieval.first_rank(ranked, {"hit"}) for ranked in single] == ranks
    recall = np.mean([retrieval.recall_at(ranked, {"hit"}, 10) for ranked in single])
    assert recall == pytest.approx(o["recall_at_10"], abs=1e-6)
    assert retrieval.mrr_at(ranks, 10) == pytest.approx(o["mrr_at_10"], abs=1e-6)
    found = retrieval.corpora(oracle("matrix")["R"])
    keys = {"corpora_a_n": "A_n", "corpora_f_n": "F_n", "corpora_la_n": "LA_n",
            "corpora_a_n_over_n": "AP_printed_with_1_over_t"}  # fmt: skip
    assert all(found[ours][0] == pytest.approx(o[theirs], abs=1e-6) for ours, theirs in keys.items())


def test_recall_and_gain_by_hand():
    ranked = ["a", "b", "c", "d"]
    assert retrieval.recall_at(ranked, {"b", "d", "z"}, 3) == pytest.approx(1 / 3)
    gains = {"b": 3.0, "d": 1.0, "z": 2.0}
    best = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert retrieval.ndcg_at(ranked, gains, 4) == pytest.approx((3 / math.log2(3) + 1 / math.log2(5)) / best)
    assert retrieval.ndcg_at(["b", "z", "d"], gains, 3) == pytest.approx(1.0)
    assert retrieval.ndcg_at(["b"], gains, 1) == pytest.approx(1.0)
    assert retrieval.ndcg_at(["x"], gains, 1) == 0.0
    for call in (
        lambda: retrieval.recall_at(ranked, set(), 3), lambda: retrieval.ndcg_at(ranked, {"a": 0.0}, 3),
        lambda: retrieval.hits_at([1], 0), lambda: retrieval.mrr_at([], 1),
        lambda: retrieval.ndcg_at(["b", "b"], gains, 2),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="accepted"):
            call()


def test_neighbours_of_the_oracle_file():
    o = oracle("retrieval")["knnlm"]
    words = sorted(o["p_lm"])
    tokens = [words.index(v) for v in o["values"]]
    near = knn_lm.neighbour_probabilities(o["distances"], tokens, len(words))
    assert near == pytest.approx([o["p_knn"][w] for w in words], abs=1e-6)
    both = knn_lm.mixed(near, [o["p_lm"][w] for w in words], o["lam"])
    assert both == pytest.approx([o["p_mix"][w] for w in words], abs=1e-6)


def test_neighbours_in_batches():
    rng = np.random.default_rng(3)
    distances, tokens = rng.random((2, 5, 7)) * 900, rng.integers(0, 4, (2, 5, 7))
    near = knn_lm.neighbour_probabilities(distances, tokens, 4)
    for i, j in np.ndindex(2, 5):
        weight = np.exp(distances[i, j].min() - distances[i, j])
        wanted = [weight[tokens[i, j] == v].sum() / weight.sum() for v in range(4)]
        assert near[i, j] == pytest.approx(wanted)
    assert near.sum(-1) == pytest.approx(1.0)
    model = rng.random((2, 5, 4)).astype(np.float32)
    assert knn_lm.mixed(near, model, 0.0) is model  # bit for bit
    with pytest.raises(RequestError, match="tokens are 4 to 4; accepted: 0 to 3"):
        knn_lm.neighbour_probabilities([1.0], [4], 4)
    with pytest.raises(RequestError, match=r"lam=1\.5"):
        knn_lm.mixed(near, model, 1.5)


# tools

ADD, GCD = tools.Call("add", {"a": 1, "b": [2, {"c": "x"}]}), tools.Call("gcd", {"a": 4})


def test_tool_calls_by_hand():
    said = [[ADD], [tools.Call("add", {"a": 1.0, "b": [2, {"c": "x"}]})], [tools.Call("add", {"a": 1})], [], [GCD, ADD]]
    wanted = [[ADD], [ADD], [ADD], [ADD], [ADD, GCD]]
    assert tools.call_accuracy(said, wanted) == pytest.approx(3 / 5)  # no call, and the other order
    assert tools.argument_accuracy(said, wanted) == pytest.approx(2 / 5)
    assert tools.argument_accuracy_of_right_calls(said, wanted)[0] == pytest.approx(2 / 3)
    assert tools.answer_accuracy([True, False, True, True, True], said) == pytest.approx(3 / 5)  # not without a call
    assert tools.over_trigger_rate([[], [ADD], [], [ADD, GCD]]) == (0.5, None)
    assert tools.over_trigger_rate([])[0] is None
    assert tools.argument_accuracy_of_right_calls([[]], [[ADD]])[0] is None
    with pytest.raises(RequestError, match="1 of them without a wanted call"):
        tools.call_accuracy([[ADD]], [[]])
    with pytest.raises(RequestError, match="2 answers and 1 items"):
        tools.answer_accuracy([True, False], [[ADD]])


def test_values_of_arguments_are_compared_as_json():
    same = [(1, 1.0), ("a", "a"), ([1, [2]], (1, [2])), ({"a": None}, {"a": None}), (True, True)]
    other = [(1, True), (0, False), ("1", 1), ([1, 2], [2, 1]), ({"a": 1}, {"a": 1, "b": 2}), (None, 0), ("a", "A")]
    assert all(tools.same_value(a, b) for a, b in same) and not any(tools.same_value(a, b) for a, b in other)


# alignment


def test_rewards_are_normalised_by_objective():
    found = alignment.reward_normalized([[1.0, 20.0], [3.0, 40.0]], [1.0, 10.0], [5.0, 30.0])
    assert found.tolist() == [[0.0, 0.5], [0.5, 1.5]]
    flat = alignment.reward_normalized([1.0, 2.0], [1.0, 1.0], [1.0, 3.0])
    assert np.isnan(flat[0]) and flat[1] == 0.5  # no scale, not 0


def test_preferences_wins_and_tax():
    assert alignment.win_rate(3, 2, 5) == (0.4, None) and alignment.win_rate(0, 0, 0)[0] is None
    chosen, rejected = [1.0, 2.0, 0.5, 3.0], [0.0, 2.0, 1.0, -1.0]
    assert alignment.preference_accuracy(chosen, rejected) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    swapped = alignment.preference_accuracy(rejected, chosen)
    assert swapped == pytest.approx(1 - alignment.preference_accuracy(chosen, rejected))
    assert alignment.preference_margin(chosen, rejected) == pytest.approx((1 + 0 - 0.5 + 4) / 4)
    assert alignment.alignment_tax([0.6, 0.4], [0.5, 0.45]) == pytest.approx(0.025)
    assert alignment.alignment_tax([0.6, 0.4], [0.6, 0.4]) == 0.0
    for call in (
        lambda: alignment.win_rate(-1, 0, 2), lambda: alignment.preference_accuracy([1.0], [1.0, 2.0]),
        lambda: alignment.alignment_tax([], []),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="accepted"):
            call()


def test_the_front_holds_what_nothing_beats():
    points = [(0.0, 1.0), (0.5, 0.8), (0.4, 0.8), (1.0, 0.0), (0.9, -0.1), (0.5, 0.8)]
    assert alignment.pareto_front(points) == [0, 1, 3, 5]  # equal points do not beat each other
    rng = np.random.default_rng(0)
    cloud = rng.random((40, 3))
    beats = lambda a, b: all(x >= y for x, y in zip(a, b)) and any(x > y for x, y in zip(a, b))  # noqa: E731
    wanted = [i for i, p in enumerate(cloud) if not any(beats(q, p) for q in cloud)]
    assert alignment.pareto_front(cloud) == wanted
    with pytest.raises(RequestError, match="measured points"):
        alignment.pareto_front([(0.0, math.nan)])


def test_ratios_of_heterogeneous_averaging():
    found = alignment.hma_ratios([0.5, -0.5, 1.5], 0.2)
    s = [1 / (1 + math.exp(-x)) + 0.2 for x in (0.5, -0.5, 1.5)]
    assert found == pytest.approx([0.2 * x / (sum(s) / 3) for x in s]) and found.mean() == pytest.approx(0.2)
    assert alignment.hma_ratios([0.7] * 4, 0.3) == pytest.approx([0.3] * 4)
    with pytest.raises(RequestError, match=r"pre_weight=0\.9 gives a ratio of"):
        alignment.hma_ratios([4.0, -4.0], 0.9)


def test_ratios_of_the_oracle_file():
    o = oracle("alignment")["hma_alphas"]
    found = alignment.hma_ratios(o["logits"], o["base"], o["eps"])
    assert found == pytest.approx(o["alphas"], abs=1e-6) and found.mean() == pytest.approx(o["mean"], abs=1e-6)
