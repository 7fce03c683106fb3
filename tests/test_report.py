"""Reports of made-up run directories: contents, partial runs, hostile text, runs that do not fit together."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import shutil

import pytest
from samples import EVIL, make_run

from jaxcl.cli import main
from jaxcl.errors import RequestError
from jaxcl.report import report
from jaxcl.report.html import esc, page, tag


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
        if tag not in ("meta", "wbr"):
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
    pictures = {f"{n}.{kind}" for n in ("averages", *(f"matrix-{r.name}" for r in runs)) for kind in ("png", "svg")}
    texts = {"report.html", "metrics.csv", "matrix.csv", "metrics.tex", *(f"matrix-{r.name}.tex" for r in runs)}
    assert {p.name for p in (tmp_path / "out").iterdir()} == pictures | texts
    assert page.tags.count("script") == 1  # the page's own; the evil note is text
    assert EVIL in page.text
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert links and all(link.startswith("#") for link in links)  # nothing is fetched from anywhere
    ids = [value for name, value in page.attributes if name == "id"]
    assert [link[1:] for link in links] == ids
    for word in ("Paired differences", "methods.replay.keep", "seconds.before training.eval"):
        assert word in page.text, word


def test_names_of_files_stay_text_everywhere(tmp_path):
    run = make_run(tmp_path / "a<b>&'c", 0.5, items=10)
    text = (run / "matrix.json").read_text()
    assert text.count('"s1"') == 1
    (run / "matrix.json").write_text(text.replace('"s1"', json.dumps(EVIL)))
    page = read_page(report([run], tmp_path / "out"))
    assert page.tags.count("script") == 1 and page.tags.count("b") == 0
    assert f"s0 → {EVIL} → s2" in page.text and "Task matrix of a<b>&'c" in page.text
    assert any(k == "title" and v.startswith(f"after {EVIL}, e0: ") for k, v in page.attributes)
    assert r"\textless{}script\textgreater{}alert('1')" in (tmp_path / "out/matrix-a-b-c.tex").read_text()


def test_every_picture_has_a_text_with_its_numbers(runs, tmp_path):
    page = read_page(report(runs, tmp_path))
    labels = [v for k, v in page.attributes if k == "aria-label"]
    hidden = sum(k == "aria-hidden" for k, _ in page.attributes)  # samples of lines beside names
    assert page.tags.count("svg") == 3 + 3 + 3 + hidden  # averages, tasks, losses
    assert sum(k == "role" and v == "img" for k, v in page.attributes) == 9
    rows = json.loads((runs[1] / "matrix.json").read_text())
    column = ", ".join(f"{row[0]:.3f}" for row in [rows["row0"], *rows["rows"]])
    assert any(label.startswith("e0 (accuracy)") and f"replay: {column}" in label for label in labels)


def test_text_of_a_file_stays_text():
    assert esc("<b>&'\"") == "&lt;b&gt;&amp;&#x27;&quot;"
    assert tag("td", tag("b", "<"), title='a"b') == '<td title="a&quot;b"><b>&lt;</b></td>'
    assert "<title>&lt;x&gt;</title>" in page("<x>", "", "")


def test_matrix_csv_has_every_cell_and_its_interval(runs, tmp_path):
    report(runs, tmp_path)
    rows = list(csv.DictReader((tmp_path / "matrix.csv").open()))
    assert len(rows) == 3 * 4 * 3  # runs, rows with row 0, evals
    matrix = json.loads((runs[1] / "matrix.json").read_text())
    for r in rows:
        if r["run"] == "replay":
            cells = [matrix["row0"], *matrix["rows"]][int(r["row"])]
            assert float(r["value"]) == cells[int(r["eval"][1:])]
        p, n = float(r["value"]), int(r["n"])
        assert n == 60 and r["stage"] == ("before training" if r["row"] == "0" else f"after s{int(r['row']) - 1}")
        spread = 1.96 * (p * (1 - p) / n) ** 0.5  # the normal interval of a share
        assert float(r["low"]) == pytest.approx(p - spread, abs=0.03)
        assert float(r["high"]) == pytest.approx(p + spread, abs=0.03)


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


def more_items(m):
    m["evals"][1]["n"] = 61


def swap_evals(m):
    m["stages"][0]["evals"], m["stages"][1]["evals"] = ["e1"], ["e0"]


def drop_last(m):
    m["stages"].pop()
    m["rows"].pop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_stage, "stage 'other' is in"),
        (change_metric, "metric of eval 'e0' is 'accuracy' in"),
        (drop_last, "stage 's2' is in"),
        (more_items, "n of eval 'e1' is 60 in"),
        (swap_evals, "evals of stage 's0' are ['e0'] in"),
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
        (lambda r: (r / "log.jsonl").write_text('{"step": 1, "loss": 2}\n[]\n'), "log.jsonl, line 2"),
        (lambda r: (r / "metrics.json").write_text('{"accounting": []}'), "accounting is list"),
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
