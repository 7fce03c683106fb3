"""One table of all metrics: its names, its page, and what a matrix cannot have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from samples import R, card_file

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
