"""docs/streams.md tells of every stream what its `StreamInfo` says; the line that is missing is the test's message."""

import re
from pathlib import Path

import pytest

from jaxcl.scenarios import SCENARIOS, STREAMS
from jaxcl.scenarios.base import REGIMES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "streams.md").read_text(encoding="utf-8")


def folders(info) -> str:
    """The folders of a stream's data, without filters and splits; their common parents where there are many."""
    names = [re.split(r":|/\w+=", part)[0] for data in info.data for part in data.split(" + ")]
    if len(set(names)) > 2:
        names = [name.partition("/")[0] for name in names]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def line(info) -> str:
    public = ", ".join(f"`{name}`" for name in info.public)
    stage = f"{len(info.stages)}: {info.unit}"
    cells = (f"`{info.name}`", info.doc, stage, info.regime, info.keeps, info.protocol, info.metric)
    return "| " + " | ".join([*cells, folders(info), public]) + " |"


@pytest.mark.parametrize("name", STREAMS)
def test_the_page_has_a_line_for_every_stream(name):
    info = STREAMS[name]
    assert line(info) in PAGE.splitlines()
    assert info.scenario in SCENARIOS and info.regime in REGIMES and info.public
    assert "|" not in "".join((info.doc, info.unit, info.keeps, info.protocol, info.metric))


def test_the_page_names_no_other_stream():
    named = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert sorted(named) == sorted(STREAMS)
