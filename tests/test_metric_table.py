"""One table of all metrics: its names, its page, what a matrix cannot have; and scores over several runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import R0, R, card_file, make_run

from jaxcl.cli import main
from jaxcl.errors import RequestError
from jaxcl.metrics.cmr import Step, refinement
from jaxcl.metrics.editing import counterfact
from jaxcl.metrics.fuar import INFO as FUAR
from jaxcl.metrics.matrix_file import parse_matrix
from jaxcl.metrics.nats import NATS
from jaxcl.metrics.retrieval import corpora
from jaxcl.metrics.score import score_matrix
from jaxcl.metrics.table import KINDS, METRICS, required
from jaxcl.metrics.text import TEXT_METRICS
from jaxcl.metrics.trace import citb

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")


# the table


def test_every_name_says_its_convention():
    names = [name.lower() for name in METRICS]
    assert not {"forgetting", "fgt", "bwt", "fwt", "transfer", "rouge", "rougel", "em", "f1", "accuracy"} & set(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_]+", name) for name in METRICS)
    for info in METRICS.values():
        assert info.kind in KINDS and info.convention and "|" not in info.convention + info.papers
        assert re.fullmatch(r"(metrics|refine-align|cpt)/[a-z-]+", info.card), info
    assert {info.kind for info in METRICS.values()} == set(KINDS)


def test_the_table_holds_what_the_functions_return():
    assert NATS.keys() | TEXT_METRICS.keys() | {f.name for f in FUAR} <= METRICS.keys()
    assert refinement([Step(1, 0, 0)]).keys() == {n for n, i in METRICS.items() if i.kind == "refinement"}
    assert corpora(R).keys() | citb(R).keys() <= METRICS.keys()
    pair = [(0.6, 0.2)]
    assert {f"counterfact_{k.lower()}" for k in counterfact(pair, pair, pair)} <= METRICS.keys()
    lower = {n for n, i in METRICS.items() if i.lower_is_better}
    assert {"fgt_max", "fuar", "rep_4", "ppl_final", "over_trigger_rate", "alignment_tax"} <= lower
    assert not {"aa", "bwt_over_T", "bwt_over_T_minus_1_nats", "general_delta", "csr"} & lower


def test_the_page_and_the_table_agree():
    written = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|$", PAGE, re.MULTILINE)
    assert written == [(info.name, info.convention, info.papers) for info in METRICS.values()]
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    for section, kind in zip(sections, KINDS):
        assert f"| {kind} | convention | used by |" in section
        rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        assert rows == [name for name, info in METRICS.items() if info.kind == kind]
    assert "**" not in PAGE and len(sections) == len(KINDS)


def test_list_metrics_has_every_field(capsys):
    assert main(["list", "metrics", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == METRICS.keys()
    assert rows["fuar"] == {
        "name": "fuar", "kind": "probes", "card": "metrics/trace-citb-fuar", "papers": "CKL", "lower_is_better": True,
        "needs": ["retained facts", "updated or new facts"], "convention": METRICS["fuar"].convention,
    }  # fmt: skip


# what a stream cannot have


def test_a_metric_that_a_stream_cannot_have():
    assert required("aa", METRICS, "stream 'x'") is METRICS["aa"]
    with pytest.raises(RequestError, match=r"^unknown metric 'fgt_maxx'; did you mean 'fgt_max'"):
        required("fgt_maxx", {"aa"}, "stream 'x'")
    with pytest.raises(RequestError) as e:
        required("fuar", {"aa", "aia"}, "stream 'clinc150'")
    assert str(e.value) == (
        "metric 'fuar' needs probes of facts; retained facts; updated or new facts; "
        "stream 'clinc150' has none of that; accepted: aa, aia"
    )


@pytest.fixture
def card(tmp_path) -> Path:
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(card_file()))
    return path


def test_score_of_chosen_metrics(card, capsys):
    assert main(["score", str(card), "--metric", "aa", "--metric", "fgt_max", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"].keys() == found["series"].keys() == {"aa", "fgt_max"}
    assert found["metrics"]["fgt_max"]["papers"] == "Chaudhry 2018, SAPT, DSI++"
    for name, said in (("fgt_max_nats", "task evals whose metric is nll"), ("general_delta", "evals of role 'general'"),
                       ("fgt", "unknown metric 'fgt'; did you mean")):  # fmt: skip
        assert main(["score", str(card), "--metric", name]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main(["score", str(card)]) == 0
    shown = capsys.readouterr().out
    assert "used by" in shown and "TRACE, CoIN, SAPT" in shown


def test_one_scale(tmp_path, capsys):
    obj = card_file()
    obj["evals"][1]["range"] = [0, 100]
    for row in (obj["row0"], *obj["rows"], obj["random"], obj["single"], obj["joint"]):
        row[1] *= 100
    path = tmp_path / "m.json"
    path.write_text(json.dumps(obj))
    assert main(["score", str(path), "--json"]) == 0
    blocked = json.loads(capsys.readouterr().out)["metrics"]["aa"]
    assert blocked["value"] is None and blocked["reason"].endswith("--one-scale takes shares of their ranges")
    assert main(["score", str(path), "--json", "--one-scale"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = score_matrix(parse_matrix(card_file(), "x"))["metrics"]
    assert found["scale"] == "task evals as shares of their ranges"
    for name, entry in wanted.items():
        assert found["metrics"][name]["value"] == pytest.approx(entry["value"]), name
    unbounded = card_file()
    unbounded["evals"][1]["range"] = [0, None]
    path.write_text(json.dumps(unbounded))
    assert main(["score", str(path), "--one-scale"]) == 2
    assert "a score from 0 to inf cannot be put on one scale" in capsys.readouterr().err


# over runs


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
    assert found.keys() == {"schema", "runs", "mean_and_deviation"} and len(found["runs"]) == 3
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
    assert main(["score", str(first), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all("interval" in run["metrics"]["aa"] for run in found["runs"])
    assert found["mean_and_deviation"]["aa"]["deviation"] == 0.0
