"""Continual model refinement: the card's worked stream, the oracle's, and the card's invariants."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from oracle import oracle

from jaxcl.errors import RequestError
from jaxcl.metrics import cmr
from jaxcl.metrics.cmr_run import steps_of
from jaxcl.metrics.matrix_file import write_matrix

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


def refined_run(run: Path, hits: dict[str, np.ndarray]) -> None:
    """A run of two steps, q0 and q1, with hits[eval] f64[3, n] in rows 0, 1, 2."""
    evals = [{"id": name, "metric": "exact_match_squad", "higher_is_better": True, "range": [0, 1], "n": h.shape[1]}
             | {"role": "task" if name.startswith("q") else "general"} for name, h in hits.items()]  # fmt: skip
    cells = [[float(h[k].mean()) for h in hits.values()] for k in range(3)]
    stages = [{"name": f"step{t}", "evals": [f"q{t}"]} for t in range(2)]
    (run / "predictions").mkdir(parents=True)
    matrix = {"schema": 1, "stages": stages, "evals": evals, "row0": cells[0], "rows": cells[1:]}
    write_matrix(run / "matrix.json", matrix)
    for name, h in hits.items():
        for k, row in enumerate(h.tolist()):
            items = [{"id": f"i{j}", "prediction": "", "score": x} for j, x in enumerate(row)]
            with gzip.open(run / "predictions" / f"{name}.row{k}.jsonl.gz", "wt") as f:
                f.writelines(json.dumps(item) + "\n" for item in items)


def test_a_run_is_read_as_its_steps(tmp_path):
    hits = {
        "q0": np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]]), "q1": np.array([[0, 0], [0, 1], [1, 0]]),
        "up": np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]), "a": np.array([[0, 1], [1, 1], [0, 0]]),
        "b": np.array([[0], [1], [1]]),
    }  # fmt: skip
    refined_run(tmp_path / "run", hits)
    found = steps_of(tmp_path / "run", upstream="up", ood=["a", "b"], sample=4)
    first, second = found.steps
    assert first == cmr.Step(4, 3, 2, 0.75, None, pytest.approx(1 / 3))  # f_0: no past submissions
    assert second == cmr.Step(2, 1, 1, 0.5, 0.75, 1.0)  # all four of q0 are the sample; q1's right item is not counted
    assert found.after == {"ukr": 0.25, "kg": pytest.approx(1 / 3), "okr": found.after["okr"]}
    assert found.after["okr"] in {x / 4 for x in range(5)}  # four of the six submissions, asked of f_2
    whole = steps_of(tmp_path / "run", sample=6)
    assert whole.after == {"okr": pytest.approx((3 + 1) / 6)} and whole.steps[1].okr is None
    assert whole.steps[0][:3] == first[:3] and whole.steps[0].ukr is None
    numbers = cmr.refinement(*found)
    assert numbers["efr_mean"][0] == pytest.approx((2 / 3 + 1) / 2) and numbers["csr"][0] == pytest.approx(1 - 4 / 6)
    assert numbers["oec"][0] == pytest.approx((0.5 + 0.75 + 1.0 + 1 / 3) / 4)
    assert numbers["oec_after"][0] is not None


def test_runs_that_are_no_refinement_stream_are_refused(tmp_path):
    hits = {"q0": np.array([[1, 0], [1, 1], [1, 1]]), "q1": np.array([[0, 0], [0, 1], [1, 0]])}
    refined_run(tmp_path / "a", hits)
    with pytest.raises(RequestError, match="unknown eval 'q2'"):
        steps_of(tmp_path / "a", upstream="q2")
    (tmp_path / "a/predictions/q1.row1.jsonl.gz").unlink()
    with pytest.raises(RequestError, match="queries of stage 'step1' have no predictions in row 1 or 2"):
        steps_of(tmp_path / "a")
    refined_run(tmp_path / "b", hits | {"q0": np.array([[1, 0.5], [1, 1], [1, 1]])})
    with pytest.raises(RequestError, match=r"eval 'q0' of .* has no items that are right or wrong"):
        steps_of(tmp_path / "b")
    file = tmp_path / "b/matrix.json"
    obj = json.loads(file.read_text())
    obj["stages"][0]["evals"] = ["q0", "q1"]
    file.write_text(json.dumps(obj))
    with pytest.raises(RequestError, match="stage 'step0' teaches 2 evals; accepted: one"):
        steps_of(tmp_path / "b")
