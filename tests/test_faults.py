"""A full disk, a directory that is read-only, two runs in one, what others put there: one line, and nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import killed
import pytest
from killed import contents, end, final, outside, steps, wait_for

from jaxcl.core.lock import Lock
from jaxcl.core.rundir import RunDir
from jaxcl.errors import RequestError

EXPERIMENT = Path(__file__).with_name("resume_experiment.py")
SETTINGS = ("--set", "methods=replay,ewc")


def here(out: Path, *settings: str) -> int:
    return killed.here(EXPERIMENT, out, *(settings or SETTINGS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert here(out) == 0
    return out


@pytest.fixture(scope="module")
def begun(whole, tmp_path_factory) -> Path:
    """The run as a kill left it in the middle of its second stage."""
    out = tmp_path_factory.mktemp("begun") / "out"
    status, _ = killed.stop(outside(EXPERIMENT, out, *SETTINGS), out, 1, signal.SIGKILL)
    assert status == -signal.SIGKILL
    return out


def ended(child: subprocess.Popen) -> tuple[int, str]:
    """Exit status and our one line on standard error; threads of Orbax may print tracebacks of their own around it."""
    error = child.communicate(timeout=killed.PATIENCE)[1]
    [line] = [line for line in error.splitlines() if line.startswith("jaxcl: ")]
    return child.returncode, line


def limited(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_save_that_finds_no_room_fails_the_run_and_leaves_the_last_one(whole, begun, tmp_path):
    """No file may grow beyond some kilobytes, which a full disk does to a file of weights; no root is needed."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    before = steps(out)[-1]
    most = (out / "log.jsonl").stat().st_size + 4096
    child = outside(EXPERIMENT, out, *SETTINGS, pause=0, preexec_fn=lambda: limited(most))
    status, error = ended(child)
    assert status == 1 and "could not save" in error
    assert before in steps(out) and not list((out / "checkpoints").rglob("*orbax-checkpoint-tmp*"))
    assert here(out) == 0 and final(out) == final(whole)


@pytest.fixture
def mounted(tmp_path):
    """Makes mounts, which go with the test: ``mounted(*words)`` is ``mount words... FOLDER``."""
    made: list[Path] = []

    def mount(*words: str) -> Path:
        folder = tmp_path / f"mount{len(made)}"
        folder.mkdir()
        if (
            shutil.which("mount") is None
            or subprocess.run(["mount", *words, str(folder)], capture_output=True).returncode
        ):
            pytest.skip("needs the right to mount a file system")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [pytest.param(n, marks=[] if n == 80 else pytest.mark.slow) for n in (48, 80, 224)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(room, whole, tmp_path, mounted):
    """At different sizes another file is the first that finds none: the log, the first checkpoint, a later one."""
    disk = mounted("-t", "tmpfs", "-o", f"size={room}k", "none")
    status, error = ended(outside(EXPERIMENT, disk / "out", *SETTINGS, pause=0))
    assert status == 1 and ("No space left" in error or "RESOURCE_EXHAUSTED" in error)
    out = Path(shutil.copytree(disk / "out", tmp_path / "out"))
    assert here(out) == 0 and final(out) == final(whole)


def test_a_directory_that_can_only_be_read_is_refused_untouched(whole, begun, tmp_path, request, capfd):
    if os.geteuid() == 0:
        folder = request.getfixturevalue("mounted")("--bind", "-o", "ro", str(begun))
    else:
        folder = Path(shutil.copytree(begun, tmp_path / "out"))
        folder.chmod(0o555)
    before = contents(folder)
    for out in (folder, folder / "new"):
        assert here(out) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "cannot write to --out" in error
    assert contents(folder) == before
    if os.geteuid():
        folder.chmod(0o755)  # so that pytest can remove it


def test_a_second_run_is_refused_and_a_kill_leaves_no_lock(whole, begun, tmp_path, capfd):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    before = set(steps(out))
    child = outside(EXPERIMENT, out, *SETTINGS)
    wait_for(child, lambda: set(steps(out)) - before)
    assert here(out) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "another process is at work there" in error
    assert end(child, out, signal.SIGKILL)[0] == -signal.SIGKILL
    assert here(out) == 0 and final(out) == final(whole)
    first, second = Lock(out), Lock(out)
    first.take()
    with pytest.raises(RequestError, match="another process"):
        second.take()
    first.release()
    second.take()
    second.release()


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


def test_files_that_look_like_ours_in_the_checkpoints_harm_nobody(whole, begun, tmp_path):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    train = out / "checkpoints/stages/001/00-train"
    (train / "step-00000001.manifest.json").write_text("{}")
    (train / "step-99999999.manifest.json").write_bytes(b"\xff\xfe" * 10)
    (train / "step-00000098.manifest.json").mkdir()
    (out / "checkpoints/stages/000").mkdir(exist_ok=True)
    (out / "checkpoints/stages/000/done.manifest.json").write_text('{"body": "[]", "sha256": "0"}')
    (train / "done").write_text("a file where a checkpoint goes")
    (train / "begun.manifest.json.tmp").write_text('{"half')
    assert here(out) == 0 and final(out) == final(whole)


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
