"""Reports of made-up run directories: contents, partial runs, hostile text, runs that do not fit together."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from samples import write_run

from jaxcl.cli import main
from jaxcl.errors import RequestError
from jaxcl.report import report
from jaxcl.report.figures import DARK, LIGHT, matrix_png, smoothed
from jaxcl.report.run_files import config_differences, flatten, read_runs
from jaxcl.report.table import comparison

EVIL = "<script>alert('1')</script>&\"x_y$%"


def make_run(path, keep: float, *, stages: int = 3, items: int = 60):
    """A run directory in which a task keeps ``keep`` of its score a stage."""
    draws = np.random.default_rng(5).random((1, stages, items))
    p = np.full((stages + 1, stages), 0.2)
    for t, i in np.ndindex(stages, stages):
        p[t + 1, i] = 0.9 * keep ** (t - i) if i <= t else 0.2
    write_run(path, (draws < p[:, :, None]).astype(float))
    config = {"config": {"seed": 0, "note": EVIL}, "methods": {path.name: {"keep": keep}}}
    (path / "config.json").write_text(json.dumps(config))
    log = [{"step": s, "stage": 0, "phase": "main", "loss": 2.0 / (s + 1)} for s in range(30)]
    (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    account = {"steps": 30, "seconds": [{"stage": None, "train": 0.0, "eval": 1.5}]}
    (path / "metrics.json").write_text(json.dumps({"metrics": {}, "accounting": account}))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / n, k) for n, k in (("sequential", 0.4), ("replay", 0.9), ("joint", 1.0))]


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "source", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_page_of_several_runs(runs, tmp_path):
    page = read_page(report(runs, tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("matrix-joint.png", "matrix-replay.png", "matrix-sequential.png", "metrics.csv", "metrics.tex"),
        "report.html",
    ]
    assert "script" not in page.tags  # the evil note is text
    assert EVIL in page.text
    for name, value in page.attributes:  # nothing is fetched from anywhere
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/png;base64,")
    alts = [v for k, v in page.attributes if k == "alt"]
    cells = read_runs(runs)[0].matrix
    assert any(f"after s1: e0 {cells.rows[1, 0]:.3f}, e1 {cells.rows[1, 1]:.3f}" in a for a in alts)
    assert page.tags.count("img") == len(alts) == 3 + 1 + 3  # matrices, progress, losses
    for word in ("Paired differences", "methods.replay.keep", "seconds.before training.eval"):
        assert word in page.text, word
    style = (tmp_path / "out/report.html").read_text()
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_csv_holds_the_numbers_of_the_matrix(runs, tmp_path):
    report(runs, tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    by = {(r["run"], r["metric"]): r for r in rows}
    final = json.loads((runs[1] / "matrix.json").read_text())["rows"][-1]
    entry = by["replay", "aa"]
    assert float(entry["value"]) == pytest.approx(sum(final) / 3)
    assert float(entry["low"]) < float(entry["value"]) < float(entry["high"])
    none = by["replay", "fwt_plasticity"]
    assert (none["value"], none["low"], none["reason"]) == ("", "", "needs single")
    assert float(by["sequential", "fgt_max"]["value"]) > float(by["joint", "fgt_max"]["value"])


def test_latex_is_escaped_and_booktabs(tmp_path):
    run = make_run(tmp_path / "a_b&50%", 0.5)
    text = (report([run], tmp_path / "out").parent / "metrics.tex").read_text()
    assert r"a\_b\&50\%" in text and r"fgt\_max" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert body.count(" & ") == 5 and len(re.findall(r"\$-?\d\.\d{3}\$", body)) == 5


def test_an_unfinished_run_is_partial_and_exit_0(runs, tmp_path, capsys):
    part = tmp_path / "half"
    shutil.copytree(runs[0], part)
    matrix = json.loads((part / "matrix.json").read_text())
    matrix["rows"] = matrix["rows"][:2]
    (part / "matrix.json").write_text(json.dumps(matrix))
    (part / "metrics.json").unlink()
    log = part / "log.jsonl"
    log.write_text(log.read_text()[:-9])  # a kill in mid-line
    assert main(["report", str(part), str(runs[1]), "--out", str(tmp_path / "out")]) == 0
    text = read_page(tmp_path / "out/report.html").text
    assert "partial: 2 of 3 stages are done" in text and "no paired difference" in text
    assert "(partial)" in (tmp_path / "out/metrics.tex").read_text()
    assert capsys.readouterr().out.strip() == f"report: {tmp_path / 'out/report.html'}"
    (part / "matrix.json").unlink()  # killed before anything was evaluated
    assert main(["report", str(part), "--out", str(tmp_path / "out2")]) == 0
    assert "nothing has been evaluated yet" in read_page(tmp_path / "out2/report.html").text


def rename_stage(m):
    m["stages"][1]["name"] = "other"


def change_metric(m):
    m["evals"][0]["metric"] = "rougeL_f1"


def drop_last(m):
    m["stages"].pop()
    m["rows"].pop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_stage, "name of stage 's1' is 's1' in"),
        (change_metric, "metric of eval 'e0' is 'accuracy' in"),
        (drop_last, "3 and 2 stages"),
    ],
)
def test_runs_of_other_streams_are_refused(runs, tmp_path, edit, message, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    matrix = json.loads((other / "matrix.json").read_text())
    edit(matrix)
    (other / "matrix.json").write_text(json.dumps(matrix))
    assert main(["report", str(runs[0]), str(other), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and str(other) in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "config.json").write_text("{"), "config.json, line 1"),
        (lambda r: (r / "config.json").write_text("[]"), "config.json is list"),
        (lambda r: (r / "log.jsonl").write_text('{"step": 1, "loss": 2}\nnonsense\n'), "log.jsonl, line 2"),
        (lambda r: (r / "matrix.json").write_text("{}"), "schema"),
        (lambda r: (r / "predictions/e0.row1.jsonl.gz").write_bytes(b"x"), "e0.row1.jsonl.gz"),
        (shutil.rmtree, "no run directory"),
        (lambda r: [(r / n).unlink() for n in ("matrix.json", "config.json")], "holds no run"),
    ],
)
def test_damaged_runs_are_refused_and_nothing_is_written(tmp_path, damage, message):
    run = make_run(tmp_path / "run", 0.5, items=10)
    damage(run)
    with pytest.raises(RequestError, match=message):
        report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_odd_requests(runs, tmp_path):
    with pytest.raises(RequestError, match="given twice"):
        report([runs[0], runs[0]], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file"):
        report(runs[:1], tmp_path / "file")
    with pytest.raises(RequestError, match="at least one"):
        report([], tmp_path)


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
