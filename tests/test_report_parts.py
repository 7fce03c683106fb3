"""The parts of a report: reading runs, differences of configs, pictures, the terminal's table."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from samples import make_run

from jaxcl.report import report
from jaxcl.report.figures import DARK, LIGHT, matrix_png, smoothed
from jaxcl.report.run_files import config_differences, flatten, read_runs
from jaxcl.report.table import comparison


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
    nested = {"a": [1, 2], "b": [{"stage": "x", "s": 1}, {"stage": None, "s": 2}]}
    assert flatten(nested) == {"a": [1, 2], "b.x.s": 1, "b.before training.s": 2}


def test_matrix_picture_shows_good_cells_in_other_colours(runs):
    """The picture itself: the colour of the best cell is not the colour of the worst, and NaN draws none."""
    from matplotlib.image import imread

    m = read_runs(runs[:1], intervals=False)[0].matrix
    pictures = [imread(io.BytesIO(matrix_png(m, t))) for t in (LIGHT, DARK)]
    assert not np.array_equal(*pictures)
    blank = m._replace(rows=np.full_like(m.rows, np.nan), row0=np.full_like(m.row0, np.nan))
    bare = imread(io.BytesIO(matrix_png(blank)))

    def colours(picture):
        return len(np.unique((picture[..., :3].reshape(-1, 3) * 255).astype(int), axis=0))

    assert colours(pictures[0]) > colours(bare) + 5


def test_smoothed_keeps_the_mean():
    points = [(s, float(s % 7)) for s in range(3000)]
    short = smoothed(points, 300)
    assert len(short) == 300
    assert np.mean([v for _, v in short]) == pytest.approx(np.mean([v for _, v in points]))
    assert smoothed(points[:5]) == points[:5]


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
