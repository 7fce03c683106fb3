"""Metrics against the worked matrix of the accuracy-matrix card, the perplexity card and invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from oracle import oracle
from samples import JOINT, R0, RANDOM, SINGLE, R, card_file

from jaxcl.errors import RequestError
from jaxcl.metrics.matrix import METRICS, cl_metrics, explain, make_scores, series
from jaxcl.metrics.matrix_file import parse_matrix
from jaxcl.metrics.over_runs import over_runs
from jaxcl.metrics.score import score_matrix

CARD = {  # the values printed in the card, each worked out by hand there
    "aa": 0.7325,
    "aia": 0.763125,
    "fgt_max": 0.093333333,
    "fgt_max_since_learned": 0.086666667,
    "fgt_max_including_T": 0.103333333,
    "fgt_diag": 0.073333333,
    "bwt_over_T_minus_1": -0.073333333,
    "bwt_over_T": -0.055,
    "fwt_vs_random_over_T_minus_1": 0.34,
    "fwt_vs_random_over_T": 0.255,
    "fwt_vs_zero_shot": 0.223333333,
    "fwt_no_baseline": 0.44,
    "fwt_plasticity": -0.0075,
    "learning_accuracy": 0.7875,
    "learning_accuracy_without_first": 0.783333333,
    "intransigence_last": 0.03,
    "intransigence_mean": 0.025,
    "zero_shot_gain": 0.52,
}
ORACLE_NAMES = {  # name in oracle.json of each of ours
    "aa": "AA_final",
    "aia": "AIA",
    "fgt_max": "FGT_max_all_stages_before_T",
    "fgt_max_since_learned": "FGT_max_since_learned",
    "fgt_max_including_T": "FGT_max_including_T",
    "fgt_diag": "FGT_diag_minus_final",
    "bwt_over_T_minus_1": "BWT_div_T_minus_1",
    "bwt_over_T": "BWT_div_T",
    "fwt_vs_random_over_T_minus_1": "FWT_vs_random_div_T_minus_1",
    "fwt_vs_random_over_T": "FWT_vs_random_div_T",
    "fwt_vs_zero_shot": "FWT_vs_zero_shot_div_T_minus_1",
    "fwt_no_baseline": "FWT_no_baseline_div_T_minus_1",
    "fwt_plasticity": "FWT_diag_minus_single_div_T",
    "learning_accuracy": "learning_accuracy_all",
    "learning_accuracy_without_first": "learning_accuracy_without_first",
    "intransigence_last": "intransigence_last",
    "intransigence_mean": "intransigence_mean",
    "zero_shot_gain": "zero_shot_gain_final",
}


def test_every_metric_equals_the_card():
    found = cl_metrics(R, R0, RANDOM, SINGLE, JOINT)
    assert found.keys() == CARD.keys() == METRICS.keys()
    for name, value in CARD.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_series_equal_the_card():
    found = series(make_scores(R))
    assert found["aa"] == pytest.approx([0.80, 0.80, 0.72, 0.7325], abs=1e-6)
    assert found["fgt_max"][0] is None
    assert found["fgt_max"][1:] == pytest.approx([0.10, 0.07, 0.093333333], abs=1e-6)
    assert found["bwt_over_T"][1:] == pytest.approx([-0.10 / 2, (0.04 - 0.18) / 3, -0.055], abs=1e-9)  # TRACE


def test_every_metric_equals_the_oracle_file():
    o = {"metrics": oracle("metrics")}
    m = oracle("matrix")
    found = cl_metrics(m["R"], m["R0"], m["RAND"], m["SINGLE"], m["JOINT"])
    for ours, theirs in ORACLE_NAMES.items():
        assert found[ours] == pytest.approx(o["metrics"][theirs], abs=1e-6), ours
    per_stage = {"AA_per_stage", "FGT_max_all_stages_per_stage_2_to_T"}
    assert set(ORACLE_NAMES.values()) | per_stage == set(o["metrics"])
    steps = series(make_scores(m["R"]))
    assert steps["aa"] == pytest.approx(o["metrics"]["AA_per_stage"], abs=1e-6)
    expected = o["metrics"]["FGT_max_all_stages_per_stage_2_to_T"]
    assert steps["fgt_max"][1:] == pytest.approx(expected, abs=1e-6)


def test_losses_are_negated_first():
    """The perplexity card's worked matrix in nats: forgetting 0.5, BWT -0.5, FWT 0.2."""
    nll = {
        "schema": 1,
        "stages": [{"name": f"d{i}", "evals": [f"d{i}/nll"]} for i in range(3)],
        "evals": [
            {"id": f"d{i}/nll", "metric": "nll", "higher_is_better": False, "range": [0, None], "n": 9}
            | {"role": "task"}
            for i in range(3)
        ],
        "row0": [2.9, 3.3, 3.6],
        "rows": [[2.0, 3.2, 3.5], [2.4, 2.1, 3.3], [2.6, 2.5, 2.2]],
    }
    found = score_matrix(parse_matrix(nll, "nll"))
    assert "negated" in found["sign"]
    assert found["metrics"]["fgt_max"]["value"] == pytest.approx(0.5)
    assert found["metrics"]["bwt_over_T_minus_1"]["value"] == pytest.approx(-0.5)
    assert found["metrics"]["fwt_vs_zero_shot"]["value"] == pytest.approx(0.2)
    assert found["metrics"]["aa"]["value"] == pytest.approx(-(2.6 + 2.5 + 2.2) / 3)


@pytest.mark.parametrize("seed", range(50))
def test_chain_of_forgetting(seed):
    rng = np.random.default_rng(seed)
    m = cl_metrics(rng.random((5, 5)))
    chain = [m[k] for k in ("fgt_max_including_T", "fgt_max", "fgt_max_since_learned", "fgt_diag")]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(chain))
    assert m["fgt_max_including_T"] >= 0
    assert m["fgt_diag"] == pytest.approx(-m["bwt_over_T_minus_1"])
    assert m["bwt_over_T"] == pytest.approx(m["bwt_over_T_minus_1"] * 4 / 5)


def test_permutation_scaling_and_constants():
    rng = np.random.default_rng(1)
    A, row0, rand, single, joint = rng.random((5, 5)), *rng.random((4, 5))
    order = rng.permutation(5)
    base = cl_metrics(A, row0, rand, single, joint)
    moved = (v[order] for v in (row0, rand, single, joint))
    again = cl_metrics(A[:, order], *moved, learned=list(order))
    for name in METRICS:  # the order of the columns is only a matter of writing
        assert again[name] == pytest.approx(base[name]), name
    both = cl_metrics(A[np.ix_(order, order)])
    assert both["learning_accuracy"] == pytest.approx(base["learning_accuracy"])
    last_fixed = np.append(rng.permutation(4), 4)
    assert cl_metrics(A[np.ix_(last_fixed, last_fixed)])["aa"] == pytest.approx(base["aa"])
    hundred = cl_metrics(100 * A, 100 * row0, 100 * rand, 100 * single, 100 * joint)
    for name in METRICS:
        assert hundred[name] == pytest.approx(100 * base[name]), name
    flat = np.full(5, 0.4)
    constant = cl_metrics(np.full((5, 5), 0.4), flat, flat, flat, flat)
    for name, value in constant.items():
        level = name in ("aa", "aia", "fwt_no_baseline") or name.startswith("learning_accuracy")
        assert value == pytest.approx(0.4 if level else 0.0, abs=1e-12), name


def test_one_stage_has_no_forgetting_value():
    found = explain(make_scores([[0.7]], [0.2], [0.1], [0.8], [0.8]))
    assert found["aa"][0] == found["aia"][0] == 0.7
    for name in METRICS:
        if name.startswith(("fgt", "bwt", "fwt_vs", "fwt_no")) or name == "learning_accuracy_without_first":
            assert found[name][0] is None and "undefined" in found[name][1], name


def test_missing_baselines_and_cells_are_null_with_a_reason_never_zero():
    found = explain(make_scores(R))
    assert found["zero_shot_gain"] == (None, "needs row0")
    assert found["fwt_plasticity"] == (None, "needs single")
    assert found["intransigence_mean"] == (None, "needs joint")
    hole = np.array(R)
    hole[1, 0] = np.nan  # below the diagonal: only a maximum over stages or AA_2 looks there
    found = explain(make_scores(hole, R0))
    for name in ("fgt_max", "fgt_max_since_learned", "fgt_max_including_T", "aia"):
        assert found[name][0] is None and "not measured" in found[name][1], name
    assert found["fgt_diag"][0] == pytest.approx(0.073333333) and found["aa"][0] == pytest.approx(0.7325)
    upper = np.where(np.triu(np.ones((4, 4)), 1) > 0, np.nan, np.array(R))
    found = explain(make_scores(upper, R0))
    assert found["fgt_max"][0] is None and found["fwt_no_baseline"][0] is None
    assert found["fgt_max_since_learned"][0] == pytest.approx(0.086666667)


def test_a_stage_that_teaches_several_evals():
    """Each eval is a task with its own stage: written out by hand for evals learned at stages 0, 0, 1, 2."""
    A = np.array([[0.9, 0.8, 0.1, 0.2], [0.7, 0.9, 0.8, 0.3], [0.6, 0.5, 0.4, 0.9]])
    m = cl_metrics(A, [0.1, 0.2, 0.1, 0.2], learned=[0, 0, 1, 2])
    assert m["aa"] == pytest.approx((0.6 + 0.5 + 0.4 + 0.9) / 4)
    assert m["aia"] == pytest.approx(((0.9 + 0.8) / 2 + (0.7 + 0.9 + 0.8) / 3 + 0.6) / 3)
    assert m["bwt_over_T_minus_1"] == pytest.approx(((0.6 - 0.9) + (0.5 - 0.8) + (0.4 - 0.8)) / 3)
    assert m["bwt_over_T"] == pytest.approx(-1.0 / 4)
    assert m["fgt_max"] == pytest.approx((0.3 + 0.4 + 0.4) / 3)
    assert m["fwt_vs_zero_shot"] == pytest.approx(((0.1 - 0.1) + (0.3 - 0.2)) / 2)
    with pytest.raises(RequestError, match="learned="):
        cl_metrics(np.zeros((3, 2)))


def test_over_runs_is_mean_and_sample_deviation():
    found = over_runs([{"aa": 0.1, "fgt_max": None}, {"aa": 0.4, "fgt_max": 0.2}])
    assert found["aa"] == pytest.approx((0.25, math.sqrt(2 * 0.15**2)))
    assert found["fgt_max"] is None


def test_general_and_probe_evals_are_drift_not_tasks():
    """TRACE's general ability delta: (0.46, 0.28, 0.60) -> (0.40, 0.02, 0.55) is -0.123333333."""
    obj = card_file()
    for i in range(3):
        obj["evals"].append(obj["evals"][0] | {"id": f"g{i}", "role": "general"})
    probe = {"id": "ppl", "role": "probe", "higher_is_better": False, "range": [0, None]}
    obj["evals"].append(obj["evals"][0] | probe)
    obj["row0"] = [*R0, 0.46, 0.28, 0.60, 2.0]
    obj["rows"] = [[*r, 0.40, 0.02, 0.55, 2.5] for r in R]
    for k in ("random", "single", "joint"):
        obj[k] = [*obj[k], None, None, None, None]
    found = score_matrix(parse_matrix(obj, "x"))
    for name, value in CARD.items():
        assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-6)
    assert found["drift"]["mean_delta"]["general"]["value"] == pytest.approx(-0.123333333, abs=1e-6)
    assert found["drift"]["evals"]["ppl"]["delta"] == pytest.approx(-0.5)  # a loss that rose


def test_evals_of_different_scale_are_not_averaged():
    obj = card_file()
    obj["evals"][1]["range"] = [0, 100]
    found = score_matrix(parse_matrix(obj, "x"))
    assert all(v["value"] is None and "different scale" in v["reason"] for v in found["metrics"].values())
