"""Continual model refinement: the card's worked stream, the oracle's, and the card's invariants."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import oracle

from jaxcl.errors import RequestError
from jaxcl.metrics import cmr

STEPS = [cmr.Step(4, 1, 1, 0.90, None, 0.30), cmr.Step(4, 2, 1, 0.85, 0.75, 0.35),
         cmr.Step(4, 3, 3, 0.80, 0.70, 0.38), cmr.Step(4, 2, 2, 0.82, 0.78, 0.42)]  # fmt: skip


def test_refinement_of_the_card():
    assert [cmr.efr(s)[0] for s in STEPS] == [1, 0.5, 1, 1]
    assert cmr.success(STEPS) == [0.75, 0.5, 0.25, 0.5]
    assert cmr.cumulative_success(STEPS) == [0.75, 0.625, 0.5, 0.5]
    found = cmr.refinement(STEPS, after={"ukr": 0.8, "okr": 0.9, "kg": 0.4})
    assert found["efr_mean"][0] == 0.875 and found["oec"][0] == pytest.approx(0.63)
    assert found["ukr_mean"][0] == pytest.approx(0.8425) and found["okr_mean"][0] == pytest.approx(2.23 / 3)
    assert found["oec_after"][0] == pytest.approx((0.5 + 0.8 + 0.9 + 0.4) / 4)


def test_refinement_of_the_oracle_file():
    o = oracle("cmr")
    columns = zip(o["errors"], o["fixed"], o["UKR"], o["OKR"], o["KG"])
    steps = [cmr.Step(o["batch"], *column) for column in columns]
    assert [cmr.efr(s)[0] for s in steps] == pytest.approx(o["EFR"])
    assert cmr.success(steps) == pytest.approx(o["SR"]) and cmr.cumulative_success(steps) == pytest.approx(o["CSR"])
    found = cmr.refinement(steps)
    assert found["efr_mean"][0] == pytest.approx(o["mean_EFR"], abs=1e-6)
    assert found["oec"][0] == pytest.approx(o["OEC_T"], abs=1e-6)


def test_refinement_invariants():
    assert cmr.cumulative_success(STEPS)[-1] == pytest.approx(np.mean(cmr.success(STEPS)))  # equal batches
    perfect = cmr.refinement([cmr.Step(4, 0, 0, 0.9, 0.9, 0.9)] * 3)
    assert perfect["csr"] == (1.0, None)
    assert perfect["efr_mean"] == (None, "undefined: no step's error-fixing rate is defined")
    frozen = cmr.refinement([cmr.Step(4, 2, 0, 0.9, 0.7, 0.3)] * 3)
    assert frozen["efr_mean"] == (0.0, None) and frozen["ukr"] == frozen["ukr_mean"] == (0.9, None)
    bare = cmr.refinement([cmr.Step(4, 2, 1)])
    assert bare["ukr"] == (None, "not measured at the last step") and bare["oec"] == (None, "needs ukr, okr, kg")
    assert bare["ukr_after"] == (None, "not measured after the last repair") and bare["ukr_mean"][0] is None
    assert cmr.efr(cmr.Step(4, 0, 0)) == (None, "undefined: there was no error to fix")
    for bad in (cmr.Step(4, 5, 1), cmr.Step(4, 1, 2), cmr.Step(0, 0, 0), cmr.Step(4, -1, -1)):
        with pytest.raises(RequestError, match="step 2 has"):
            cmr.refinement([STEPS[0], bad])
    with pytest.raises(RequestError, match="without steps"):
        cmr.refinement([])


def test_the_sample_of_past_submissions_is_the_same_for_every_method():
    history = [f"q{i}" for i in range(50)]
    first = cmr.past_sample(history, 8, seed=0, step=3)
    assert first == cmr.past_sample(list(history), 8, seed=0, step=3) and len(set(first)) == 8 <= len(history)
    assert set(first) <= set(history)
    others = [cmr.past_sample(history, 8, seed=s, step=t) for s, t in ((0, 4), (1, 3))]
    assert all(other != first for other in others)
    assert cmr.past_sample(history[:7], 8, seed=0, step=3) is None  # skipped while too few exist
