"""TRACE, CITB, FUAR and losses in nats: the cards' worked numbers and invariants."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from oracle import oracle
from samples import R0, R, card_file

from jaxcl.errors import RequestError
from jaxcl.metrics import nats, trace
from jaxcl.metrics.fuar import NO_GAIN, fuar, fuar_of
from jaxcl.metrics.matrix_file import parse_matrix
from jaxcl.metrics.score import score_matrix

# TRACE and CITB


def test_trace_and_citb_of_the_worked_matrix():
    assert trace.trace_op(R) == pytest.approx([0.80, 0.80, 0.72, 0.7325])
    steps = trace.trace_bwt_over_t(R)
    assert steps[0] is None and steps[1:] == pytest.approx([-0.05, (0.04 - 0.18) / 3, -0.055])
    found = trace.citb(R, initial=0.4)
    assert found["aa"] == (pytest.approx(0.7325), None) and found["citb_fr_initial"] == (0.4, None)
    assert found["bwt_over_T_minus_1"][0] == pytest.approx(-0.073333333, abs=1e-9)
    assert found["fwt_no_baseline"][0] == pytest.approx(0.44)
    assert found["citb_fr_unseen"] == (None, "not measured")


def test_trace_deltas_of_the_oracle_file():
    o = oracle("trace")
    for name, key in (("general", "GD"), ("instruct", "IFD"), ("safety", "SD")):
        assert trace.delta(o[f"{name}_before"], o[f"{name}_after"]) == pytest.approx(o[key], abs=1e-6)


def test_deltas_are_zero_without_change_and_add_up_by_size():
    rng = np.random.default_rng(0)
    before, after = rng.random(5), rng.random(5)
    assert trace.delta(before, before) == 0.0
    whole = (2 * trace.delta(before[:2], after[:2]) + 3 * trace.delta(before[2:], after[2:])) / 5
    assert trace.delta(before, after) == pytest.approx(whole)
    with pytest.raises(RequestError, match="2 values before and 1 after"):
        trace.delta([1, 2], [1])


def test_scores_are_put_on_one_scale_before_they_are_averaged():
    scaled = trace.on_one_scale([[50.0, 0.5], [100.0, 0.0]], [(0.0, 100.0), (0.0, 1.0)])
    assert scaled.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    with pytest.raises(RequestError, match="a score from 0 to inf cannot be put on one scale"):
        trace.on_one_scale([1.0, 2.0], [(0.0, 1.0), (0.0, math.inf)])


def with_roles() -> dict:
    """The worked matrix, and TRACE's three worked deltas after every stage, the last one scaled up to there."""
    before = {"general": [0.46, 0.28, 0.60], "instruction": [0.50, 0.70], "safety": [0.90]}
    after = {"general": [0.40, 0.02, 0.55], "instruction": [0.35, 0.65], "safety": [0.88]}
    obj = card_file()
    template = obj["evals"][0]
    for role, values in before.items():
        obj["evals"] += [template | {"id": f"{role}{i}", "role": role} for i in range(len(values))]
    start, end = (np.array([x for values in group.values() for x in values]) for group in (before, after))
    obj["row0"] = [*R0, *start]
    obj["rows"] = [[*row, *(start + (end - start) * (t + 1) / 4)] for t, row in enumerate(R)]
    for k in ("random", "single", "joint"):
        obj[k] = [*obj[k], *[None] * len(start)]
    return json.loads(json.dumps(obj))


def test_score_has_the_deltas_by_role():
    drift = score_matrix(parse_matrix(with_roles(), "x"))["drift"]
    wanted = {"general": -0.123333333, "instruction": -0.10, "safety": -0.02}
    papers = {"general": "TRACE (GD)", "instruction": "TRACE (IFD)", "safety": "TRACE (SD)"}
    for role, value in wanted.items():
        assert drift["mean_delta"][role]["value"] == pytest.approx(value, abs=1e-6)
        assert drift["mean_delta"][role]["papers"] == papers[role]
        assert drift["mean_delta"][role]["name"] == f"{role}_delta"
        assert drift["per_stage"][role] == pytest.approx([value * t / 4 for t in (1, 2, 3, 4)], abs=1e-6)
    obj = with_roles()
    obj["rows"][1][4] = None
    holed = score_matrix(parse_matrix(obj, "x"))["drift"]
    assert holed["per_stage"]["general"][1] is None and holed["per_stage"]["general"][3] is not None
    obj["rows"][3][4] = None
    holed = score_matrix(parse_matrix(obj, "x"))["drift"]
    assert holed["mean_delta"]["general"]["value"] is None and "needs row0" in holed["mean_delta"]["general"]["reason"]


def test_losses_beside_scores_are_left_out_of_a_mean():
    obj = card_file()
    template = obj["evals"][0]
    loss = {"role": "general", "higher_is_better": False, "range": [0, None]}
    obj["evals"] += [template | {"id": "mmlu", "role": "general"}, template | loss | {"id": "news", "metric": "nll"},
                     template | loss | {"id": "wiki", "metric": "perplexity"}]  # fmt: skip
    obj["row0"], obj["rows"] = [*R0, 0.5, 2.0, 8.0], [[*row, 0.4, 2.5, 10.0] for row in R]
    for k in ("random", "single", "joint"):
        obj[k] = [*obj[k], None, None, None]
    drift = score_matrix(parse_matrix(obj, "x"))["drift"]
    assert drift["mean_delta"]["general"]["value"] == pytest.approx(-0.1)
    assert drift["mean_delta"]["general"]["left_out"] == ["news", "wiki"]
    assert drift["per_stage"]["general"] == pytest.approx([-0.1] * 4)
    assert drift["evals"]["news"]["relative_perplexity"] == pytest.approx(math.exp(0.5))
    assert drift["evals"]["wiki"]["relative_perplexity"] == pytest.approx(1.25)
    assert drift["evals"]["news"]["delta"] == pytest.approx(-0.5)
    assert "relative_perplexity" not in drift["evals"]["mmlu"]
    obj["evals"][5:] = [e | {"role": "probe", "metric": "perplexity"} for e in obj["evals"][5:]]
    alone = score_matrix(parse_matrix(obj, "x"))["drift"]["mean_delta"]["probe"]
    assert alone["value"] is None and "perplexities are not averaged" in alone["reason"]


# FUAR


def test_fuar_of_the_card():
    assert fuar([[24, 18]], [4, 9], [2, 7]) == (pytest.approx(0.6), None)
    falling = ([[24, 21]], [4, 3], [2, 8])
    assert fuar(*falling)[0] == pytest.approx(0.5)
    assert fuar(*falling, joint_max=True)[0] == pytest.approx(0.6)
    two = ([[24, 20, 19], [None, 15, 11]], [4, 5, 9], [2, 3, 6])
    assert fuar(*two)[0] == pytest.approx(9 / 16) == fuar(*two, joint_max=True)[0]


def test_fuar_of_the_oracle_file():
    o = oracle("fuar")
    one, falling, two = o["n1"], o["n1_one_negative_gap"], o["n2"]

    def of(d, **how):
        return fuar([[d["IL0"], d["IL1"]]], [d["UL0"], d["UL1"]], [d["NL0"], d["NL1"]], **how)[0]

    assert of(one) == pytest.approx(one["FUAR"], abs=1e-6)
    assert of(falling) == pytest.approx(falling["FUAR_separate_max"], abs=1e-6)
    assert of(falling, joint_max=True) == pytest.approx(falling["FUAR_joint_max"], abs=1e-6)
    assert fuar(two["T_F"], two["T_U"], two["T_A"])[0] == pytest.approx(two["FUAR"], abs=1e-6)


CKL = {  # retained, updated, new, printed FUAR: the seven rows of CKL's table (T5-large)
    "vanilla": (12.89, 10.17, 3.77, 1.08), "RecAdam": (13.20, 12.55, 4.02, 0.84),
    "Mix-Review": (13.92, 6.49, 2.89, 1.74), "LoRA": (16.58, 12.77, 4.52, 0.55),
    "K-Adapter 2": (19.59, 12.34, 5.03, 0.33), "K-Adapter 3": (19.76, 12.66, 4.02, 0.33),
    "Modular": (20.29, 12.66, 4.65, 0.28),
}  # fmt: skip


@pytest.mark.parametrize("row", CKL)
def test_fuar_of_the_published_table(row):
    retained, updated, new, printed = CKL[row]
    assert round(fuar([[24.17, retained]], [1.62, updated], [1.88, new])[0], 2) == printed


def test_fuar_invariants():
    assert fuar([[24, 24]], [4, 4], [2, 2]) == (None, NO_GAIN)  # an unchanged model
    assert fuar([[24, 10]], [4, 3], [2, 1]) == (None, NO_GAIN)  # only losses: not infinite
    assert fuar([[24, 30]], [4, 9], [2, 7]) == (0.0, None)  # more retained than before counts as no loss
    assert fuar([[24, 18]], [4, 9], None)[0] == pytest.approx(6 / 5)  # a probe that does not exist
    late = fuar([[24, 20, 19]], [4, 5, 9], [None, 3, 6])  # one that exists from stage 1
    assert late[0] == pytest.approx(5 / (5 + 4 + 3))
    for bad, said in (
        (([[24, 18]], [4], [2, 7]), "lengths"), (([], [4, 5], [2, 7]), "lengths"), (([[24]], [4], [2]), "lengths"),
        (([[24, 18]], None, None), "without gained facts"), (([[24, None]], [4, 9], None), "without a last score"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            fuar(*bad)


def test_fuar_of_a_matrix():
    """The worked example of two stages, as a run's probes."""
    names = ("kept0", "kept1", "changed", "new")
    columns = ([24, 20, 19], [None, 15, 11], [4, 5, 9], [2, 3, 6])
    task = card_file()["evals"][0]
    evals = [task | {"id": name, "role": "probe", "range": [0, 100]} for name in names]
    rows = [[None if x is None else float(x) for x in row] for row in zip(*columns)]
    obj = {"schema": 1, "stages": [{"name": f"s{i}", "evals": []} for i in range(2)], "evals": evals,
           "row0": rows[0], "rows": rows[1:]}  # fmt: skip
    m = parse_matrix(obj, "x")
    asked = {"retain": ["kept0", "kept1"], "update": "changed", "acquire": "new"}
    assert fuar_of(m, **asked) == (pytest.approx(0.5625), None)
    assert fuar_of(m, **asked | {"acquire": None})[0] == pytest.approx(9 / (5 + 4))
    with pytest.raises(RequestError, match="unknown probe 'chanjed'; did you mean 'changed'"):
        fuar_of(m, **asked | {"update": "chanjed"})
    evals[2] |= {"higher_is_better": False, "metric": "nll"}
    with pytest.raises(RequestError, match="probe 'changed' is scored by nll"):
        fuar_of(parse_matrix(obj, "x"), **asked)


# perplexity and nats


def nll_file(**changes) -> dict:
    evals = [{"id": f"d{i}", "metric": "nll", "higher_is_better": False, "range": [0, None], "n": 9, "role": "task"}
             for i in range(3)]  # fmt: skip
    return {"schema": 1, "stages": [{"name": f"s{i}", "evals": [f"d{i}"]} for i in range(3)], "evals": evals,
            "row0": [2.9, 3.3, 3.6], "rows": [[2.0, 3.2, 3.5], [2.4, 2.1, 3.3], [2.6, 2.5, 2.2]]} | changes  # fmt: skip


def test_perplexity_is_token_weighted():
    assert nats.perplexity([2.0, 3.0], [100, 300]) == pytest.approx(15.642631884, abs=1e-6)
    assert nats.perplexity([math.log(49152)] * 3, [5, 1, 20]) == pytest.approx(49152)  # a uniform model
    assert nats.perplexity([2.0, 9.0], [10, 0]) == pytest.approx(math.exp(2))  # padding is not scored
    assert nats.bits_per_byte(math.log(2) * 24, 12) == pytest.approx(2.0)
    for bad in ([], [0, 0], [-1, 2], [1]):
        with pytest.raises(RequestError, match="accepted: one count for each of 2 chunks"):
            nats.perplexity([2.0, 3.0], bad)
    with pytest.raises(RequestError, match="0 bytes"):
        nats.bits_per_byte(1.0, 0)


def test_nats_of_the_oracle_file():
    o = oracle("perplexity")
    assert nats.perplexity(o["mean_nll"], o["tokens"]) == pytest.approx(o["token_weighted"], abs=1e-6)
    assert o["chunk_averaged"] != pytest.approx(o["token_weighted"]) != pytest.approx(o["mean_of_ppl"])
    N, n0 = o["nll_matrix"], o["nll_zero_shot"]
    found = score_matrix(parse_matrix(nll_file(row0=n0, rows=N), "x"))["metrics"]
    wanted = {"fgt_max_nats": "forgetting_nats", "bwt_over_T_minus_1_nats": "bwt_nats",
              "fwt_vs_zero_shot_nats": "fwt_nats_vs_zero_shot", "ppl_final": "final_mean_ppl_of_mean_nll"}  # fmt: skip
    for ours, theirs in wanted.items():
        assert found[ours]["value"] == pytest.approx(o[theirs], abs=1e-6), ours
    first = nats.relative_perplexity(N[-1][0], n0[0])
    assert first == pytest.approx(o["relative_ppl_domain1_final_over_start"], abs=1e-6)


def test_nats_are_for_losses_in_nats():
    found = score_matrix(parse_matrix(nll_file(), "x"))["metrics"]
    assert found["fgt_max_nats"]["value"] == pytest.approx(0.5)
    assert found["bwt_over_T_minus_1_nats"]["value"] == pytest.approx(-0.5)
    assert found["fwt_vs_zero_shot_nats"]["value"] == pytest.approx(0.2)
    assert found["ppl_final"]["value"] == pytest.approx(math.exp(7.3 / 3))
    assert found["ppl_relative_to_start"]["value"] == pytest.approx(math.exp((2.6 + 2.5 + 2.2 - 2.9 - 3.3 - 3.6) / 3))
    assert found["aa"]["value"] == pytest.approx(-7.3 / 3)  # the plain ones stay, negated
    perplexities = nll_file(row0=np.exp([2.9, 3.3, 3.6]).tolist(), rows=np.exp(nll_file()["rows"]).tolist())
    perplexities["evals"] = [e | {"metric": "perplexity"} for e in perplexities["evals"]]
    same = score_matrix(parse_matrix(perplexities, "x"))
    assert "logarithms" in same["sign"] and same["metrics"].keys() == found.keys()
    for name, entry in same["metrics"].items():  # differences of logarithms, never of perplexities
        assert entry["value"] == pytest.approx(found[name]["value"]), name
    bytes_ = nll_file()
    bytes_["evals"] = [e | {"metric": "bits_per_byte"} for e in bytes_["evals"]]
    assert nats.NATS.keys().isdisjoint(score_matrix(parse_matrix(bytes_, "x"))["metrics"])
    without = score_matrix(parse_matrix(nll_file(row0=None), "x"))["metrics"]["ppl_relative_to_start"]
    assert without["value"] is None and without["reason"] == "needs row0"
