"""`jaxcl bench` on the tiny model: what it prints, never how long anything took."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics

import pytest

from jaxcl.bench.sides import SIDES, chosen
from jaxcl.bench.turns import Round, in_turn, summary
from jaxcl.cli import main

SHORT = ("--rows", "2", "--window", "16", "--targets", "4", "--rounds", "2", "--warm", "1")


def test_sides_take_turns():
    said = []
    found = in_turn(lambda: said.append("base"), lambda: said.append("side"), rounds=3, warm=1)
    assert said == ["base", "side", "side", "base", "base", "side", "side", "base"] and len(found) == 3


def test_ratios_are_taken_within_a_round():
    rounds = [Round(1.0, 2.0, 1.0, 3.0), Round(10.0, 11.0, 2.0, 2.0), Round(4.0, 6.0, 4.0, 8.0)]
    got = summary(rounds)
    assert got["ratio"] == 1.5 and got["ratio_range"] == [1.1, 2.0] and got["cpu_ratio"] == 2.0
    assert got["seconds"] == statistics.median([2.0, 11.0, 6.0]) and got["base_seconds"] == 4.0


@pytest.fixture(scope="module")
def report():
    """Three kinds of sides: a step, one method's last stage beside its first, a forward pass."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["bench", "--method", "olora", "--method", "mofo", "--method", "grace", *SHORT, "--json"]) == 0
    return json.loads(out.getvalue())


def test_the_report_has_every_side(report):
    assert report["model"] == "tiny" and (report["rows"], report["window"], report["targets"]) == (2, 16, 4)
    names = [s["side"] for s in report["sides"]]
    assert sorted(names) == sorted(s.name for s in SIDES if s.method in ("olora", "mofo", "grace"))
    for side in report["sides"]:
        low, high = side["ratio_range"]
        assert 0 < low <= side["ratio"] <= high and math.isfinite(high) and side["seconds"] > 0
        assert side["rss_peak_bytes"] > 2**20


def test_steps_are_compiled_once_whatever_the_stage(report):
    steps = {s["side"]: s for s in report["sides"] if "forward" not in s["side"]}
    assert all(s["compilations"] == 1 for s in steps.values())
    last = steps["olora, stage 16 against 1"]
    assert last["stage"] == 15 and last["against"] == "olora, stage 1" and last["bytes"] == last["base_bytes"]


def test_memory_is_the_compilers(report):
    sides = {s["side"]: s for s in report["sides"]}
    for side in sides.values():
        if "bytes" in side:
            assert side["bytes"]["peak"] >= side["bytes"]["arguments"] > 0
    whole, folded = (sides[f"olora, bank of 15{end}"]["bytes"] for end in ("", " folded"))
    assert folded["arguments"] < whole["arguments"], "what is folded does not go into the step"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--method olra", "unknown method 'olra' in --method; did you mean 'olora'?"),
        ("--base lor", "unknown base 'lor' in --base; did you mean 'lora'"),
        ("--rounds 0", "--rounds is 0"),
        ("--rows 0", "--rows is 0; accepted: a whole number of at least 1"),
        ("--window 8", "--window is 8; accepted: more than the 8 answer tokens"),
        ("--window 4096", "accepted: up to 1024"),
        ("--model nowhere", "unknown model 'nowhere'"),
    ],
)
def test_bad_requests_are_refused(line, expected, capsys):
    assert main(["bench", *line.split()]) == 2
    assert expected in capsys.readouterr().err


def test_a_base_and_a_method_narrow_the_sides():
    assert [s.name for s in chosen(("ewc",), ("full",))] == ["ewc, full"]
    assert len(chosen((), ())) == len(SIDES)
