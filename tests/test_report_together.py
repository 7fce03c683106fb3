"""Runs side by side: seeds and orders, single-task and joint baselines, general ability beside the tasks."""

from __future__ import annotations

import csv
import json
import re
import statistics

import numpy as np
import pytest
from report_runs import STAGES, make_stream_run

from jaxcl.cli import main
from jaxcl.errors import RequestError
from jaxcl.report import report
from jaxcl.report.config import repetitions
from jaxcl.report.curves import looks
from jaxcl.report.heat import drift_matrix, scales, task_matrix
from jaxcl.report.together import read_runs

ORDERS = [("alpha", "beta", "gamma"), ("alpha", "beta", "gamma"), ("gamma", "alpha", "beta")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods on three seeds, the third in another order; joint training; every task alone."""
    folder = tmp_path_factory.mktemp("runs")
    out = {}
    for method, keep in (("finetune", 0.5), ("replay", 0.8)):
        for seed, order in enumerate(ORDERS):
            name = f"{method}-{seed}"
            how = {"keep": keep, "seed": seed, "learns": order, "general": ("g", "h")}
            out[name] = make_stream_run(folder / name, {method: {}}, **how)
    out["joint"] = make_stream_run(folder / "joint", {"joint": {}}, keep=1.0, general=("g", "h"))
    for task in STAGES:
        name = f"only-{task}"
        out[name] = make_stream_run(folder / name, {"finetune": {}}, seed=4, learns=[task], general=("g", "h"))
    return out


def matrix(run):
    found = json.loads((run / "matrix.json").read_text())
    return found | {"rows": np.array(found["rows"]), "row0": np.array(found["row0"])}


def test_seeds_and_orders_of_a_method_are_grouped(runs, tmp_path):
    read = read_runs(list(runs.values()), intervals=False)
    groups = [[r.name for r in g] for g in repetitions(read)]
    assert ["finetune-0", "finetune-1", "finetune-2"] in groups and ["replay-0", "replay-1", "replay-2"] in groups
    report(list(runs.values()), tmp_path)
    rows = {(r["methods"], r["metric"]): r for r in csv.DictReader((tmp_path / "groups.csv").open())}
    final = [float(np.mean(matrix(runs[f"replay-{k}"])["rows"][-1, :3])) for k in range(3)]
    assert float(rows["replay", "aa"]["mean"]) == pytest.approx(statistics.mean(final))
    assert float(rows["replay", "aa"]["deviation"]) == pytest.approx(statistics.stdev(final))
    assert rows["replay", "aa"]["runs"] == "replay-0 replay-1 replay-2"
    assert {methods for methods, _ in rows} == {"finetune", "replay"}
    text = (tmp_path / "metrics.tex").read_text()
    assert f"${statistics.mean(final):.3f} \\pm {statistics.stdev(final):.3f}$" in text
    page = (tmp_path / "report.html").read_text()
    assert "3 runs, 2 orders" in page and "gamma → alpha → beta (finetune-2, replay-2)" in page
    assert "replay-2: no paired difference, another order of the stages" in page


def test_a_value_that_changes_parts_runs(tmp_path):
    paths = [make_stream_run(tmp_path / n, {"ewc": {"strength": s}}, items=4) for n, s in (("a", 1.0), ("b", 2.0))]
    assert len(repetitions(read_runs(paths, intervals=False))) == 2


def test_single_task_runs_are_the_single_baseline(runs):
    read = {r.name: r for r in read_runs(list(runs.values()), intervals=False)}
    alone = {t: matrix(runs[f"only-{t}"])["rows"][0, i] for i, t in enumerate(STAGES)}
    for name, order in (("replay-0", ORDERS[0]), ("replay-2", ORDERS[2])):
        m = matrix(runs[name])
        gaps = [m["rows"][order.index(t), i] - alone[t] for i, t in enumerate(STAGES)]
        assert read[name].score["metrics"]["fwt_plasticity"]["value"] == pytest.approx(np.mean(gaps))
    assert read["only-beta"].alone == "beta" and read["only-beta"].score["metrics"]["fwt_plasticity"]["value"] is None
    one = {r.name: r for r in read_runs([runs["replay-0"], runs["only-beta"]], intervals=False)}
    assert one["replay-0"].score["metrics"]["fwt_plasticity"]["value"] is None  # no baseline of alpha and gamma


def test_single_task_runs_of_two_kinds_are_refused(runs, tmp_path):
    other = make_stream_run(tmp_path / "lora", {"lora": {}}, learns=["beta"], general=("g", "h"))
    with pytest.raises(RequestError, match=r"'finetune' in .*only-alpha and 'lora' in .*lora"):
        read_runs([runs["replay-0"], runs["only-alpha"], other])


def test_a_joint_run_lends_its_scores_to_runs_in_its_order(runs):
    read = {r.name: r for r in read_runs(list(runs.values()), intervals=False)}
    gap = np.diag(matrix(runs["joint"])["rows"]) - np.diag(matrix(runs["replay-1"])["rows"])
    assert read["replay-1"].score["metrics"]["intransigence_mean"]["value"] == pytest.approx(gap.mean())
    assert read["replay-2"].score["metrics"]["intransigence_mean"]["value"] is None


def test_a_stage_of_another_stream_is_no_single_task_run(runs, tmp_path):
    other = make_stream_run(tmp_path / "odd", stages=("alpha", "delta"), learns=["delta"], general=("g", "h"))
    with pytest.raises(RequestError, match=r"stage 'delta' is in .*odd and not in .*replay-0"):
        read_runs([runs["replay-0"], other])


def test_repetitions_share_a_colour_and_differ_in_dashes(runs):
    look = looks(read_runs(list(runs.values()), intervals=False))
    assert len({look[f"replay-{k}"].colour for k in range(3)}) == 1
    assert len({look[f"replay-{k}"].dash for k in range(3)}) == 3
    assert len({look[n].colour for n in ("finetune-0", "replay-0", "joint")}) == 3


def test_general_ability_stands_beside_the_tasks_as_change(runs):
    m = matrix(runs["replay-0"])
    change = m["rows"][:, 3:] - m["row0"][3:]
    rows = re.findall(r"<tr><th[^>]*>after (\w+)</th>(.*?)</tr>", drift_matrix(read_runs([runs["replay-0"]])[0], 1.0))
    shown = np.array([[float(x) for x in re.findall(r">([+-][\d.]+)</td>", cells)] for _, cells in rows])
    assert [name for name, _ in rows] == list(STAGES)
    np.testing.assert_allclose(shown, np.column_stack([change, change.mean(1)]), atol=6e-4)


def test_columns_follow_the_order_of_the_run(runs):
    read = read_runs([runs["replay-2"]], intervals=False)
    drawn = task_matrix(read[0], scales([read[0].matrix]))
    assert re.findall(r'<th scope="col"[^>]*>(\w+)</th>', drawn) == list(ORDERS[2])
    m, order = matrix(runs["replay-2"]), [STAGES.index(t) for t in ORDERS[2]]
    shown = [float(x) for x in re.findall(r'<td class="h v\d+ own"[^>]*>([\d.]+)</td>', drawn)]
    np.testing.assert_allclose(shown, [m["rows"][t, i] for t, i in enumerate(order)], atol=6e-4)  # the diagonal


def test_losses_of_general_ability_count_the_other_way_round(tmp_path):
    path = make_stream_run(tmp_path / "run", general=("g", "h"))
    found = json.loads((path / "matrix.json").read_text())
    found["evals"][3] |= {"higher_is_better": False}
    (path / "matrix.json").write_text(json.dumps(found))
    drawn = drift_matrix(read_runs([path], intervals=False)[0], 1.0)
    assert found["rows"][-1][3] < found["row0"][3] and "mean of general" not in drawn  # two directions, no mean
    assert f'change {found["row0"][3] - found["rows"][-1][3]:+.4g}' in drawn


def test_intervals_of_evals_that_are_no_mean_of_their_items(tmp_path):
    """A ratio of sums, bootstrapped here in numpy: the interval of nats per token."""
    import gzip

    path = make_stream_run(tmp_path / "run", stages=("alpha",), items=50)
    rng = np.random.default_rng(3)
    parts = np.stack([rng.gamma(2.0, 40.0, 50), rng.integers(20, 60, 50)], -1)
    found = json.loads((path / "matrix.json").read_text())
    value = parts[:, 0].sum() / parts[:, 1].sum()
    found["evals"][0] |= {"metric": "nll", "higher_is_better": False, "range": [0, None], "pool": "ratio"}
    found |= {"row0": [value], "rows": [[value]]}
    (path / "matrix.json").write_text(json.dumps(found))
    for k in range(2):
        with gzip.open(path / f"predictions/alpha.row{k}.jsonl.gz", "wt") as f:
            for j, (a, b) in enumerate(parts):
                item = {"id": f"item{j}", "prediction": None, "score": a / b, "parts": [a, b]}
                f.write(json.dumps(item) + "\n")
    report([path], tmp_path / "out")
    cell = next(csv.DictReader((tmp_path / "out/matrix.csv").open()))
    drawn = parts[rng.integers(0, 50, (4000, 50))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert float(cell["value"]) == pytest.approx(value)
    assert [float(cell["low"]), float(cell["high"])] == pytest.approx([low, high], abs=0.03)


def test_evals_of_different_scale_are_averaged_only_as_shares_of_their_ranges(tmp_path, capsys):
    path = make_stream_run(tmp_path / "run")
    found = json.loads((path / "matrix.json").read_text())
    found["evals"][1] |= {"range": [0, 100]}
    for row in (found["row0"], *found["rows"]):
        row[1] = row[1] * 100
    (path / "matrix.json").write_text(json.dumps(found))
    aa = {}
    for name, flags in (("plain", []), ("shares", ["--one-scale"])):
        assert main(["report", str(path), "--out", str(tmp_path / name), *flags]) == 0
        aa[name] = {r["metric"]: r for r in csv.DictReader((tmp_path / name / "metrics.csv").open())}["aa"]
        page = (tmp_path / name / "report.html").read_text()
        assert f">{found['rows'][-1][1]:.1f}</td>" in page  # the matrix stays as measured
        assert ("No averages: evals of different scale" in page) == (name == "plain")
    last = found["rows"][-1]
    assert aa["plain"]["value"] == ""
    assert float(aa["shares"]["value"]) == pytest.approx((last[0] + last[1] / 100 + last[2]) / 3)


def test_a_run_that_was_only_evaluated_shows_its_scores_and_intervals(tmp_path):
    path = make_stream_run(tmp_path / "run", done=0, general=("g", "h"))
    (path / "metrics.json").write_text(json.dumps({"accounting": {"seconds": [], "steps": 0}}))
    page = report([path], tmp_path / "out").read_text()
    assert "measured before training only" in page and "partial:" not in page
    rows = re.findall(r'<tr><th scope="row">(\w)\w*</th><td>accuracy, higher is better</td>(.*?)</tr>', page)
    shown = {name: [float(x) for x in re.findall(r'data-v="([\d.]+)"', cells)] for name, cells in rows}
    assert shown == {n[0]: [40.0, v] for n, v in zip((*STAGES, "g", "h"), matrix(path)["row0"])}
    assert all(re.search(r">0\.\d{3} to 0\.\d{3}<", cells) for _, cells in rows)
    assert 'id="metrics"' not in page and 'id="drift"' not in page  # nothing has changed yet
