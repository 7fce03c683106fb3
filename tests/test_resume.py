"""A run that was stopped, anywhere and by anything, ends as one that was not: weights, memories, log and matrix."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import killed
import numpy as np
import pytest
from killed import contents, files, final, load, steps, stop, store
from resume_experiment import METHODS
from support import run, tiny

from jaxcl.core import journal

EXPERIMENT = Path(__file__).with_name("resume_experiment.py")
REPLAY_EWC = ("--set", "methods=replay,ewc")
OLORA_MOFO = ("--set", "methods=olora", "--set", "optimizer=mofo", "--set", "reset_opt=false")


def here(out: Path, *settings: str) -> int:
    """The run in this process; its exit status."""
    return killed.here(EXPERIMENT, out, *settings)


def outside(out: Path, *settings: str) -> subprocess.Popen:
    """The run in a process of its own."""
    return killed.outside(EXPERIMENT, out, *settings)


class Broken:
    """An unbroken run, and one killed from outside in the middle of its second stage."""

    def __init__(self, folder: Path, settings: tuple[str, ...]):
        self.settings, self.whole, self.killed = settings, folder / "whole", folder / "killed"
        status, _ = stop(outside(self.killed, *settings), self.killed, 1, signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert here(self.whole, *settings) == 0

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.killed, to))

    def check(self, out: Path) -> None:
        """Continues in ``out`` and compares with the run that was never broken."""
        assert here(out, *self.settings) == 0
        assert final(out) == final(self.whole)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Broken:
    return Broken(tmp_path_factory.mktemp("replay-ewc"), REPLAY_EWC)


def test_replay_and_ewc_killed_in_mid_stage(broken, tmp_path, capfd):
    out = broken.copy(tmp_path / "out")
    lines = (out / "log.jsonl").read_bytes()
    assert broken.whole.joinpath("log.jsonl").read_bytes().startswith(lines[: lines.rfind(b"\n") + 1])
    broken.check(out)
    assert "continuing after stages/001/" in capfd.readouterr().out
    before = final(out)
    assert here(out, *broken.settings) == 0 and "is finished" in capfd.readouterr().out
    assert final(out) == before


def test_olora_and_mofo_with_a_kept_optimizer_killed_in_mid_stage(tmp_path):
    run = Broken(tmp_path, OLORA_MOFO)
    run.check(run.killed)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_killed_in_mid_stage(name, tmp_path):
    run = Broken(tmp_path, ("--set", f"methods={name}"))
    run.check(run.killed)


def test_sigterm_then_sigint_save_and_exit_75(broken, tmp_path):
    out = tmp_path / "out"
    for stage, number in ((0, signal.SIGTERM), (1, signal.SIGINT)):
        status, error = stop(outside(out, *broken.settings), out, stage, number)
        assert status == 75
        assert error.count("\n") == 1 and number.name in error and "same command continues" in error
        newest = journal.newest(store(out), lambda _: None)
        assert store(out).read(newest)["meta"]["log_bytes"] == (out / "log.jsonl").stat().st_size, "nothing is lost"
    broken.check(out)


def test_a_flipped_byte_in_any_file_falls_back_to_the_checkpoint_before(broken, tmp_path):
    """Every file of the newest checkpoint, its manifest, and the start of the phase that it needs."""
    ordered = sorted(store(broken.killed).entries(), key=journal.position)
    *_, before, newest = ordered
    begun = store(broken.killed).read(newest)["meta"]["begun"]
    root = broken.killed / "checkpoints"
    inside = files(root / newest)
    cases = [(f, before) for f in (*inside, root / f"{newest}.manifest.json")]
    cases += [(f, ordered[ordered.index(begun) - 1]) for f in files(root / begun)]
    assert len(inside) > 3
    for n, (file, expected) in enumerate(cases):
        out = broken.copy(tmp_path / str(n))
        flip(out / file.relative_to(broken.killed))
        said: list[str] = []
        assert journal.newest(store(out), said.append) == expected, file
        assert any(newest in line and "damaged" in line and expected in line for line in said), said


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_newest_checkpoint_changes_nothing_in_the_end(broken, tmp_path, capfd):
    out = broken.copy(tmp_path / "out")
    newest = out / "checkpoints" / steps(out)[-1]
    flip(max(files(newest), key=lambda f: f.stat().st_size))
    broken.check(out)
    assert "is damaged" in capfd.readouterr().out


def test_what_others_left_in_the_checkpoints_harms_nobody(broken, tmp_path):
    """Folders of a save that a kill cut off, and files that are none of ours."""
    out = broken.copy(tmp_path / "out")
    root = out / "checkpoints"
    leftover = root / "stages/001/00-train/step-00000099.orbax-checkpoint-tmp-1234"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"x" * 100)
    shutil.copytree(root / steps(out)[-1], root / "stages/001/00-train/step-00000098")  # no manifest: not committed
    (root / "notes.txt").write_text("mine")
    (root / "stages" / "mine.manifest.json").write_text("{}")
    broken.check(out)
    assert not leftover.exists() and (root / "notes.txt").read_text() == "mine"


def test_half_a_line_in_the_log_is_cut_and_a_lost_log_is_refused(broken, tmp_path, capfd):
    out = broken.copy(tmp_path / "longer")
    with (out / "log.jsonl").open("ab") as f:
        f.write(b'{"step": 99, "los')
    broken.check(out)
    out = broken.copy(tmp_path / "shorter")
    kept = (out / "log.jsonl").read_bytes()[:100]
    (out / "log.jsonl").write_bytes(kept)
    before = sorted(out.rglob("*"))
    capfd.readouterr()
    assert here(out, *broken.settings) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "log.jsonl" in error and "100 bytes" in error
    assert (out / "log.jsonl").read_bytes() == kept and sorted(out.rglob("*")) == before


def test_a_directory_of_another_config_is_refused_with_the_difference(broken, tmp_path, capfd):
    out = broken.copy(tmp_path / "out")
    before = contents(out)
    assert here(out, *broken.settings, "--set", "seed=4", "--set", "rows=65") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "config.seed is 3 there and 4 here" in error and "config.rows is 64 there and 65 here" in error
    assert contents(out) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    assert here(tmp_path / "photos", *broken.settings) == 2 and "holds no run" in capfd.readouterr().err
    assert [f.name for f in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_lora_stage_writes_the_adapters_only(tmp_path):
    """The frozen base is a reference to the weights as given, in every entry of every stage."""
    from jaxcl.models.decoder import decoder

    spec = tiny(vocab=8192, layers=1, width=32)
    params = decoder(spec).init(spec, jax.random.key(0))
    base = sum(v.nbytes for v in params.values())
    method = METHODS["lora"]()
    done = run([method], tmp_path / "out", spec=spec, params=params, n=2, save_every=1, keep=2)
    for stage in ("000", "001"):
        folder = done.out / "checkpoints" / "stages" / stage
        written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        assert 0 < written < base / 4, f"stage {stage} wrote {written} bytes, the base has {base}"
    refs = store(done.out).read("stages/001/done")["refs"]
    assert all(refs[k][0] == "source" for k in journal.flatten(params, "params"))
    found = journal.nest(load(done.out, "stages/001/done", params), "params")
    assert all(np.array_equal(found[k], params[k]) for k in params)


def test_old_stages_go_and_the_last_two_step_checkpoints_stay(tmp_path):
    """Stage 1 stays only as what stage 2 began with: the same arrays, written once."""
    done = run([METHODS["finetune"]()], tmp_path / "out", n=4, save_every=1, keep=1)
    found = store(done.out).entries()
    assert {journal.position(e).stage for e in found} == {1, 2, 3}
    assert [e for e in found if e.startswith("stages/001/")] == [e for e in found if "001/00-train/done" in e]
    assert len(steps(done.out)) == 2
    assert json.loads((done.out / "metrics.json").read_text())["accounting"]["steps"] == 8
