"""A run whose directory is in a bucket: killed and continued, it ends as one on a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_bucket import Objects, bucket

from jaxcl.cli import main
from jaxcl.core import bucket as buckets
from jaxcl.core.bucket import Mirror, files, near, place, remove, size
from jaxcl.errors import RequestError

EXPERIMENT = Path(__file__).with_name("resume_experiment.py")
SETTINGS = ("--set", "methods=replay", "--set", "rows=24")
OUT = "gs://bucket/runs/first"


@pytest.fixture(scope="module")
def served():
    """(objects, environment) of one fake bucket: the libraries keep its address."""
    if not all(map(buckets._installed, buckets.PACKAGES)):  # importing them here would be too early: they read env
        pytest.skip("no gcsfs or google-cloud-storage (pip install 'jaxcl[bucket]')")
    with bucket() as (objects, env):
        yield objects, env


@pytest.fixture
def cloud(served, monkeypatch) -> Objects:
    objects, env = served
    objects.data.clear()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return objects


def run(out: str) -> int:
    return main(["run", str(EXPERIMENT), "--out", out, *SETTINGS])


def killed(objects: Objects, part: str) -> None:
    """A run in a process of its own, killed once an object appears whose name holds ``part``."""
    path = os.pathsep.join([str(EXPERIMENT.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "jaxcl", "run", str(EXPERIMENT), "--out", OUT, *SETTINGS]
    env = os.environ | {"PYTHONPATH": path, "JAXCL_TEST_PAUSE": "0.05"}
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 600
    try:
        while not any(part in name for name in list(objects.data)):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < end, f"no {part} appeared"
            time.sleep(0.01)
    finally:
        child.kill()
        child.communicate(timeout=60)
    assert "runs/first/metrics.json" not in objects.data, "the signal came too late to test anything"


def test_a_killed_run_in_a_bucket_continues_and_ends_as_one_on_a_disk(cloud, tmp_path, capsys):
    killed(cloud, "/001/00-train/step-00000009.manifest.json")
    capsys.readouterr()
    assert run(OUT) == 0
    assert "continuing after stages/001/00-train/step-00000009" in capsys.readouterr().out
    assert run(str(tmp_path / "disk")) == 0
    for name in ("log.jsonl", "matrix.json"):
        assert cloud.data[f"runs/first/{name}"][0] == (tmp_path / "disk" / name).read_bytes(), name
    there = {str(f.relative_to(place(OUT))) for f in files(place(OUT))}
    here = {str(f.relative_to(tmp_path / "disk")) for f in files(tmp_path / "disk")}
    plain = lambda names: {n for n in names if not n.startswith(("events/", "checkpoints/"))}  # noqa: E731
    assert plain(there) == plain(here) >= {"config.json", "metrics.json", "matrix.json", "log.jsonl"}
    entries = lambda names: {n for n in names if n.endswith(".manifest.json")}  # noqa: E731
    assert entries(there) == entries(here) and len(entries(there)) > 2
    assert len([n for n in there if n.startswith("events/")]) == 2  # one of each process that wrote
    capsys.readouterr()
    assert run(OUT) == 0 and "is finished" in capsys.readouterr().out


def test_another_run_in_the_bucket_is_refused_by_its_address(cloud, capsys):
    (place(OUT) / "config.json").write_text('{"experiment": "other"}')
    assert run(OUT) == 2
    error = capsys.readouterr().err
    assert f"--out {OUT} holds a run of another config: experiment is" in error and error.count("\n") == 1
    assert list(cloud.data) == ["runs/first/config.json"]


def test_a_mirror_sends_what_changed_and_leaves_checkpoints_alone(cloud):
    there = place(OUT)
    for name in ("log.jsonl", "predictions/a.gz", "checkpoints/big"):
        (there / name).write_text(name)
    mirror = Mirror(there)
    mirror.pull()
    assert sorted(str(f.relative_to(mirror.here)) for f in files(mirror.here)) == ["log.jsonl", "predictions/a.gz"]
    before = dict(cloud.data)
    mirror.push()
    assert cloud.data == before  # nothing changed, nothing is written
    (mirror.here / "log.jsonl").write_text("more")
    (mirror.here / "half.json.tmp").write_text("")
    mirror.push()
    assert cloud.data["runs/first/log.jsonl"][0] == b"more" and len(cloud.data) == 3
    mirror.remove()
    assert not mirror.here.exists()


def test_files_and_sizes_are_those_of_the_bucket(cloud):
    there = place("gs://bucket/a/")
    (there / "x").write_text("123")
    (there / "b" / "y").write_text("")
    assert [str(f) for f in sorted(files(there))] == ["gs://bucket/a/b/y", "gs://bucket/a/x"]
    assert size(there / "x") == 3 and list(files(place("gs://bucket/none"))) == []
    remove(there / "b")
    remove(there / "none")
    assert list(cloud.data) == ["a/x"]


def test_data_is_copied_once_and_again_where_it_changed(cloud, tmp_path, monkeypatch, capsys):
    there = place("gs://bucket/data")
    (there / "set" / "train.jsonl").write_text("one")
    (there / "set" / "test.jsonl").write_text("two")
    here = near("gs://bucket/data/", tmp_path)
    assert here == tmp_path / "buckets" / "bucket" / "data"
    (there / "set" / "test.jsonl").write_text("three")
    cloud.calls.clear()
    assert near("gs://bucket/data", tmp_path) == here
    assert {str(f.relative_to(here)): f.read_text() for f in files(here)} == {
        "set/train.jsonl": "one",
        "set/test.jsonl": "three",
    }
    assert not any("train.jsonl" in call for call in cloud.calls)
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path))
    monkeypatch.setenv("JAXCL_DATA", "")
    assert main(["run", str(EXPERIMENT), "--data", "gs://bucket/none", "--out", str(tmp_path / "out")]) == 2
    assert "gs://bucket/none: no such folder, or it is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_addresses_and_missing_packages_are_named(monkeypatch, tmp_path):
    assert place("runs/x") == Path("runs/x") and place(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="gs://: no bucket; accepted: gs://BUCKET/FOLDER"):
        place("gs://")
    monkeypatch.setattr(buckets, "_installed", lambda package: package != "gcsfs")
    with pytest.raises(RequestError, match=r"'gcsfs'; install it with: pip install 'jaxcl\[bucket\]'"):
        place("gs://bucket/x")
