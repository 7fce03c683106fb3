"""matrix.json: round trip, unfinished runs, and files that must be refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import R, card_file

from jaxcl.errors import RequestError
from jaxcl.metrics import matrix_file
from jaxcl.metrics.matrix_file import read_matrix, write_matrix
from jaxcl.metrics.score import score_matrix


def test_file_round_trip_and_unfinished_run(tmp_path):
    path = tmp_path / "matrix.json"
    write_matrix(path, card_file())
    full = read_matrix(tmp_path)
    assert not full.partial and score_matrix(full)["metrics"]["aa"]["value"] == pytest.approx(0.7325)
    write_matrix(path, full)
    assert json.loads(path.read_text())["rows"] == R
    write_matrix(path, card_file(rows=[*R[:2]]))
    part = score_matrix(read_matrix(path))
    assert part["partial"] and part["stages_done"] == 2 and part["stages"] == 4
    assert part["metrics"]["aa"]["value"] == pytest.approx((0.70 + 0.90) / 2)  # tasks seen so far only
    assert part["metrics"]["fgt_max"]["value"] == pytest.approx(0.10)
    write_matrix(path, card_file(rows=[]))
    none = score_matrix(read_matrix(path))["metrics"]
    assert all(v["value"] is None and v["reason"] for v in none.values())
    assert list(tmp_path.iterdir()) == [path]  # no scratch file left


def change(obj, path, value):
    *head, last = path
    for p in head:
        obj = obj[p]
    obj[last] = value


BAD = [
    (["schema"], 2, r"schema is 2; accepted: 1"),
    (["schema"], True, r"schema is True"),
    (["rows", 1], [0.1, 0.2], r"rows\[1\] has 2 values; accepted: 4"),
    (["rows"], [*R, R[0]], r"rows is 5 rows; accepted: at most 4"),
    (["rows", 2, 1], 1.5, r"rows\[2\]\[1\] \(e1\) is 1.5; accepted: a number from 0 to 1"),
    (["rows", 2, 1], "0.5", r"rows\[2\]\[1\] is '0.5'; accepted: a finite number"),
    (["rows", 2, 1], True, r"rows\[2\]\[1\] is True"),
    (["rows", 2, 1], 10**400, r"rows\[2\]\[1\] is 1000"),
    (["rows"], {"a": 1}, r"rows is \{'a': 1\}; accepted: a list"),
    (["joint"], [0.1], r"joint has 1 values"),
    (["row0", 0], -0.1, r"row0\[0\] \(e0\) is -0.1"),
    (["stages", 1, "evals"], ["e7"], r"unknown eval 'e7' in stages\[1\].evals; accepted: e0, e1"),
    (["stages", 1, "evals"], "e1", r"stages\[1\].evals is 'e1'; accepted: a list"),
    (["stages", 0], 3, r"stages\[0\] is 3"),
    (["evals", 0, "role"], "tasks", r"evals\[0\].role is 'tasks'; accepted: task, general, probe"),
    (["evals", 0, "role"], "probe", r"role of 'e0' in stages\[0\].evals is 'probe'"),
    (["evals", 0, "range"], [1, 0], r"evals\[0\].range is \[1, 0\]"),
    (["evals", 0, "range"], 1, r"evals\[0\].range is 1"),
    (["evals", 0, "n"], 0, r"evals\[0\].n is 0"),
    (["evals", 0, "higher_is_better"], 1, r"higher_is_better is 1"),
    (["evals", 1, "id"], "e0", r"ids that differ"),
    (["evals"], None, r"evals is None"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{p}={str(v)[:9]}" for p, v, _ in BAD])
def test_bad_matrices_are_refused_in_one_line(tmp_path, path, value, message):
    obj = card_file()
    change(obj, path, value)
    file = tmp_path / "m.json"
    file.write_text(json.dumps(obj))
    with pytest.raises(RequestError, match=message) as e:
        read_matrix(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400
    target = tmp_path / "out.json"
    with pytest.raises(RequestError):
        write_matrix(target, obj)
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"schema": 1,,', "line 2"),
        ("[1]", "the file is list"),
        ('{"schema": NaN}', "NaN"),
        ("[" * 200_000, "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, text, message):
    file = tmp_path / "m.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match=message):
        read_matrix(file)


def test_size_is_bounded_and_absence_is_named(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_matrix(tmp_path / "none.json")
    with pytest.raises(RequestError, match="no such file"):
        read_matrix(tmp_path)
    file = tmp_path / "m.json"
    file.write_text(" " * 2000)
    for path in (file, Path("/dev/zero")):
        with pytest.raises(RequestError, match="at most 1000"):
            matrix_file.load_json(path, max_bytes=1000)
