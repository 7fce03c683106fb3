"""`jaxcl score` of several runs: mean and deviation over seeds and orders, and what is not averaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import R0, R, card_file, make_run

from jaxcl.cli import main
from jaxcl.metrics.score import score_matrix


def seeds(folder: Path) -> list[Path]:
    """Three runs of one stream, the third in another order of its stages."""
    paths = []
    for i in range(3):
        rng = np.random.default_rng(i)
        obj = card_file(rows=rng.random((4, 4)).tolist(), row0=R0)
        if i == 2:
            obj["stages"].reverse()
            obj["evals"].reverse()
            obj["row0"] = R0[::-1]
        paths.append(folder / f"{i}.json")
        paths[-1].write_text(json.dumps(obj))
    return paths


def test_several_runs_give_mean_and_sample_deviation(tmp_path, capsys):
    paths = seeds(tmp_path)
    assert main(["score", *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"schema", "runs", "differences", "mean_and_deviation"} and len(found["runs"]) == 3
    alone = []
    for path, run in zip(paths, found["runs"]):
        assert main(["score", str(path), "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
        assert run == {"path": str(path)} | alone[-1]
    for name, entry in found["mean_and_deviation"].items():
        values = [a["metrics"][name]["value"] for a in alone]
        mean = sum(values) / 3
        assert entry["mean"] == pytest.approx(mean) and entry["n"] == 3 and entry["values"] == values
        assert entry["deviation"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    matrices = [json.loads(p.read_text())["rows"] for p in paths[:2]]
    averaged = score_matrix(card_file(rows=np.mean(matrices, axis=0).tolist()))["metrics"]["fgt_max"]["value"]
    assert main(["score", *map(str, paths[:2]), "--json"]) == 0
    of_two = json.loads(capsys.readouterr().out)["mean_and_deviation"]["fgt_max"]["mean"]
    assert of_two > averaged + 1e-3, "the maximum of a mean is not the mean of maxima"
    assert main(["score", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "run 3: " in shown and "deviation" in shown and f"{found['mean_and_deviation']['aa']['mean']:.4f}" in shown


def test_drift_is_averaged_over_runs(tmp_path, capsys):
    paths = []
    for i, after in enumerate((0.4, 0.5)):
        obj = card_file(row0=[*R0, 0.6], rows=[[*row, after] for row in R])
        obj["evals"].append(obj["evals"][0] | {"id": "safe", "role": "safety"})
        for k in ("random", "single", "joint"):
            obj[k].append(None)
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(obj))
    assert main(["score", *map(str, paths), "--metric", "safety_delta", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mean_and_deviation"]
    assert found.keys() == {"safety_delta"} and found["safety_delta"]["papers"] == "TRACE (SD)"
    assert found["safety_delta"]["mean"] == pytest.approx(-0.15)
    assert found["safety_delta"]["deviation"] == pytest.approx(0.1 / math.sqrt(2))


def test_runs_that_cannot_be_averaged(tmp_path, capsys):
    paths = seeds(tmp_path)
    obj = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps(obj | {"rows": obj["rows"][:2]}))
    assert main(["score", *map(str, paths[:2]), "--json"]) == 0  # a run that has not finished is no error
    entry = json.loads(capsys.readouterr().out)["mean_and_deviation"]["aa"]
    assert entry["mean"] is entry["deviation"] is None and "4 in " in entry["reason"] and "2 in " in entry["reason"]
    assert main(["score", *map(str, paths[:2])]) == 0
    assert "partial: 2 of 4 stages" in capsys.readouterr().out
    none = json.loads(paths[0].read_text())
    paths[1].write_text(json.dumps({k: v for k, v in none.items() if k != "single"}))
    assert main(["score", *map(str, paths[:2]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mean_and_deviation"]
    assert found["fwt_plasticity"]["mean"] is None and found["fwt_plasticity"]["reason"] == f"no value in {paths[1]}"
    assert found["aa"]["deviation"] == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o["stages"][1].update(name="other"), "stage 'other' is in"),
        (lambda o: o["evals"][2].update(n=7), "n of eval 'e2' is 100 in"),
        (lambda o: o["stages"][0].update(evals=["e0", "e1"]), "evals of stage 's0' is ('e0',) in"),
    ],
)  # fmt: skip
def test_runs_of_other_streams_are_refused(tmp_path, capsys, change, said):
    paths = seeds(tmp_path)
    obj = json.loads(paths[0].read_text())
    change(obj)
    paths[1].write_text(json.dumps(obj))
    assert main(["score", *map(str, paths[:2])]) == 2
    error = capsys.readouterr().err
    assert said in error and "accepted: runs of one stream" in error and error.count("\n") == 1
    assert main(["score", str(paths[0]), str(paths[0])]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_run_directories_bring_their_intervals(tmp_path, capsys):
    first = make_run(tmp_path / "a", 0.8)
    shutil.copytree(first, tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["config"]["seed"] = 7
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert main(["score", str(first), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all("interval" in run["metrics"]["aa"] for run in found["runs"])
    assert found["mean_and_deviation"]["aa"]["deviation"] == 0.0
    assert found["differences"] == {"seed": [0, 7]}
    assert main(["score", str(first), str(tmp_path / "b")]) == 0
    assert "seed, run by run: 0, 7" in capsys.readouterr().out


def test_methods_are_not_averaged(tmp_path, capsys):
    first, other = make_run(tmp_path / "a", 0.8), make_run(tmp_path / "c", 0.8)
    assert main(["score", str(first), str(other)]) == 2
    assert f"methods are a in {first} and c in {other}; accepted: seeds or orders of one" in capsys.readouterr().err
    (other / "config.json").write_text("[]")
    assert main(["score", str(first), str(other)]) == 2
    assert "config.json is list; accepted: a JSON object" in capsys.readouterr().err
