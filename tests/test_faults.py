"""Two runs in one directory, and a kill as it is made."""

from __future__ import annotations

import pytest

from jaxcl.core.rundir import RunDir
from jaxcl.errors import RequestError


def test_of_two_that_begin_at_once_one_goes_on(tmp_path):
    """Both found no directory; the second to make it sees that a run is there by now."""
    one, two = (RunDir(tmp_path / "out") for _ in range(2))
    for run in (one, two):
        run.check({"experiment": "x"})
    one.create({"experiment": "x"})
    with pytest.raises(RequestError, match="another process"):
        two.create({"experiment": "x"})
    one.close()
    with pytest.raises(RequestError, match="another process has begun a run"):
        two.create({"experiment": "x"})
    two.close()


def test_a_kill_as_the_directory_is_made_leaves_one_that_can_be_begun(tmp_path):
    """What is there before config.json is whole belongs to nobody."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json.tmp").write_text('{"half')
    run = RunDir(out)
    run.check({"experiment": "x"})
    run.create({"experiment": "x"})
    run.close()
    assert run.read("config.json") == {"experiment": "x"} and (out / "predictions").is_dir()
