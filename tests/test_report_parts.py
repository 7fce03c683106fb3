"""The parts of a report: reading runs, differences of configs, curves and pictures, the terminal's table."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from report_runs import make_stream_run
from rich.console import Console
from samples import make_run

from jaxcl.report import report
from jaxcl.report.bounds import with_bounds
from jaxcl.report.config import config_differences, flatten
from jaxcl.report.curves import learning, smoothed
from jaxcl.report.figures import matrix_figure
from jaxcl.report.heat import scales, shades
from jaxcl.report.run_files import Logged
from jaxcl.report.svg import Curve, Frame, Look, Point, chart, padded, round_ticks, span
from jaxcl.report.table import comparison
from jaxcl.report.together import read_runs
from jaxcl.report.write import render


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / n, k) for n, k in (("sequential", 0.4), ("replay", 0.9), ("joint", 1.0))]


def test_a_joint_run_is_the_joint_baseline_of_the_others(runs):
    """Intransigence against the diagonal of the joint run, computed here from the two files."""
    found = {r.name: r.score["metrics"] for r in read_runs(runs, intervals=False)}
    rows = {p.name: np.array(json.loads((p / "matrix.json").read_text())["rows"]) for p in runs}
    gap = np.diag(rows["joint"]) - np.diag(rows["replay"])
    assert found["replay"]["intransigence_mean"]["value"] == pytest.approx(gap.mean())
    assert found["replay"]["intransigence_last"]["value"] == pytest.approx(gap[-1])
    assert found["joint"]["intransigence_mean"] == {
        "value": None,
        "reason": "needs joint",
        "convention": found["joint"]["intransigence_mean"]["convention"],
        "papers": "",
    }
    alone = read_runs(runs[1:2], intervals=False)[0].score["metrics"]
    assert alone["intransigence_mean"]["reason"] == "needs joint"


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / seed / "replay", 0.9, items=10) for seed in ("seed0", "seed1")]
    assert [r.name for r in read_runs(paths)] == ["seed0/replay", "seed1/replay"]
    report(paths, tmp_path / "out")
    assert (tmp_path / "out/matrix-seed0-replay.png").is_file()


def test_config_differences(runs):
    assert config_differences(read_runs(runs[:2], intervals=False)) == [
        ("methods.sequential.keep", [0.4, None]),
        ("methods.replay.keep", [None, 0.9]),
    ]
    nested = {"a": [1, 2], "b": [{"stage": "x", "s": 1}, {"stage": None, "s": 2}], "c": {"finetune": {}}}
    assert flatten(nested) == {"a": [1, 2], "b.x.s": 1, "b.before training.s": 2, "c.finetune": {}}
    assert flatten({}) == {}


def test_matrix_picture_shows_good_cells_in_other_colours(runs):
    """The picture itself: good and bad cells differ in colour, NaN draws none, and equal numbers give equal bytes."""
    from matplotlib.image import imread

    m = read_runs(runs[:1], intervals=False)[0].matrix
    files, among = matrix_figure(m, scales([m])), scales([m])
    assert files == matrix_figure(m, among)
    blank = m._replace(rows=np.full_like(m.rows, np.nan), row0=np.full_like(m.row0, np.nan))

    def colours(png):
        picture = imread(io.BytesIO(png))
        return len(np.unique((picture[..., :3].reshape(-1, 3) * 255).astype(int), axis=0))

    assert colours(files["png"]) > colours(matrix_figure(blank, among)["png"]) + 5
    assert files["svg"].startswith(b"<?xml") and f">{m.rows[0, 0]:.3f}<".encode() in files["svg"]  # letters, no paths


def test_shades_follow_the_range_or_the_values_found(runs):
    m = read_runs(runs[:1], intervals=False)[0].matrix
    values = np.array([[0.0, 0.5, 1.0], [0.25, np.nan, 0.75]])
    m = m._replace(row0=values[0], rows=values[1:])
    np.testing.assert_allclose(shades(m, scales([m])), values)  # accuracies, 0 to 1
    loss = m._replace(evals=tuple(e._replace(higher_is_better=False, range=(0.0, np.inf)) for e in m.evals))
    loss = loss._replace(row0=np.array([2.0, 3.0, 4.0]), rows=np.full((1, 3), 2.5))
    other = loss._replace(row0=np.array([6.0, 3.0, 4.0]))
    np.testing.assert_allclose(shades(loss, scales([loss]))[0], [1.0, 0.5, 0.0])  # the lowest is the best
    np.testing.assert_allclose(shades(loss, scales([loss, other]))[0], [1.0, 0.75, 0.5])  # one scale for both runs


def test_a_chart_puts_points_where_they_belong():
    curve = Curve([Point(0, 1.0, "first"), Point(1, 3.0, "second"), Point(2, 2.0, "<third>", own=True)], Look(3, 1))
    drawn = chart([curve], label="three points", size=(200, 100), ticks=["a", "b", "c"], ys=(1.0, 3.0))
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"(.*?)><title>(.*?)</title>', drawn)
    assert [c[3] for c in circles] == ["first", "second", "&lt;third&gt;"]
    assert [c[2] for c in circles] == ["", "", ' class="own"'] and '<g class="c3">' in drawn
    (x0, y0), (x1, y1), (x2, y2) = (map(float, c[:2]) for c in circles)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert 0 < x0 < x2 < 200 and 0 < y1 < y0 < 100
    assert 'role="img" aria-label="three points"' in drawn and 'stroke-dasharray="6 3"' in drawn


def test_axes():
    assert round_ticks(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1.0]
    assert round_ticks(-0.13, 0.02) == [-0.1, -0.05, 0.0]
    assert round_ticks(3.0, 3.4) == [3.0, 3.1, 3.2, 3.3, 3.4]
    assert span([2.0]) == (1.5, 2.5) and span([]) == (0.0, 1.0) and padded((0.0, 1.0), 0.5) == (-0.5, 1.5)
    frame = Frame(200, 100, (0.0, 10.0), (0.0, 1.0))
    assert frame.x(5.0) == pytest.approx((frame.x(0) + frame.x(10)) / 2, abs=0.1) and frame.y(0.0) > frame.y(1.0)


def test_smoothed_keeps_the_mean_of_every_stage():
    log = [Logged(s, float(s % 7) + 10 * (s >= 2000), int(s >= 2000)) for s in range(3000)]
    short = smoothed(log, 300)
    assert len(short) == 300
    for lo, hi in ((0, 2000), (2000, 3000)):
        inside = [y for x, y, _ in short if lo <= x < hi]
        assert np.mean(inside) == pytest.approx(np.mean([p.loss for p in log[lo:hi]]), abs=0.02)
    assert smoothed(log[:2], 300) == [(0.0, 0.0, "step 0: loss 0.0000"), (1.0, 1.0, "step 1: loss 1.0000")]


def test_learning_curves_show_the_objective_without_what_methods_add(tmp_path):
    drawn = learning(read_runs([make_stream_run(tmp_path / "run", items=4)], intervals=False))
    losses = [float(x) for x in re.findall(r"<title>step \d+: loss ([\d.]+)</title>", drawn)]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([r["objective"] for r in log], abs=1e-4) and len(losses) == 60
    assert re.findall(r'class="break"><title>(\w+)</title>', drawn) == ["alpha", "beta", "gamma"]


def test_comparison_table_for_the_terminal(runs):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(comparison(runs))
    text = console.export_text()
    final = json.loads((runs[0] / "matrix.json").read_text())["rows"][-1]
    line = next(x for x in text.splitlines() if "sequential" in x)
    assert line.split()[1] == f"{sum(final) / 3:.3f}" and len(line.split()) == 5


def test_the_table_says_when_scores_are_negated_losses(runs, tmp_path):
    assert comparison(runs).caption is None
    lossy = tmp_path / "lossy"
    lossy.mkdir()
    matrix = json.loads((runs[0] / "matrix.json").read_text())
    matrix["evals"] = [e | {"higher_is_better": False} for e in matrix["evals"]]
    (lossy / "matrix.json").write_text(json.dumps(matrix))
    (lossy / "config.json").write_text((runs[0] / "config.json").read_text())
    assert "negated" in comparison([lossy]).caption


def test_a_page_of_ten_runs_of_fifteen_stages_stays_small(tmp_path):
    stages = tuple(f"a-task-of-the-stream-{i}" for i in range(15))
    path = make_stream_run(tmp_path / "run", stages=stages, general=("g0", "g1", "g2", "g3"), items=8, steps=200)
    config = json.loads((path / "config.json").read_text())
    config["config"] |= {f"some_value_{i}": i / 7 for i in range(60)}
    (path / "config.json").write_text(json.dumps(config))
    (run,) = with_bounds(read_runs([path]))
    runs = [run._replace(name=f"replay-of-seed-{k}", config=config | {"seed": k}) for k in range(10)]
    page = render(runs)
    assert page.count('class="heat"') == 20 and len(page.encode()) < 1.5e6
