"""A table written into a document: only what stands between its two comments changes."""

from __future__ import annotations

import pytest

from jaxcl.errors import RequestError
from jaxcl.report.marked import fill


def test_only_the_part_between_the_comments_is_written(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("above\n<!-- b -->\nkept\n<!-- /b -->\n<!-- t -->\nold\n<!-- /t -->\nbelow ü\n", encoding="utf-8")
    for text in ("| new |", "| newer |"):
        fill(file, "t", text)
        rest = f"<!-- t -->\n{text}\n<!-- /t -->\nbelow ü\n"
        assert file.read_text(encoding="utf-8") == f"above\n<!-- b -->\nkept\n<!-- /b -->\n{rest}"


@pytest.mark.parametrize("text", ["none", "<!-- t -->\nopen", "<!-- /t -->\n<!-- t -->", "<!-- t --><!-- /t -->" * 2])
def test_a_file_without_one_place_is_left_alone(text, tmp_path):
    file = tmp_path / "a.md"
    file.write_text(text)
    with pytest.raises(RequestError, match="has no one place for the table; accepted: a line <!-- t -->"):
        fill(file, "t", "x")
    assert file.read_text() == text and list(tmp_path.iterdir()) == [file]
