"""The command line from outside: exit status, one line on standard error, no jax behind help and errors."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import click
import pytest
from samples import R, card_file, write_run

from jaxcl.cli import main
from jaxcl.cli.app import app
from jaxcl.errors import Interrupted, RequestError, RunFailed

COMMANDS = ("demo", "run", "evaluate", "list", "fetch", "plan", "doctor", "score", "report", "export", "bench")


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture
def card(tmp_path):
    file = tmp_path / "matrix.json"
    file.write_text(json.dumps(card_file()))
    return file


def test_help_and_errors_do_not_import_jax():
    done = python(
        "import sys\n"
        "from jaxcl.cli import main\n"
        f"codes = {{main([c, '--help']) for c in {COMMANDS!r}}}\n"
        "codes |= {main(['--help']), main([]), main(['--version'])}\n"
        "bad = ('lst', 'list methds', 'run', 'score none.json', 'run nowhere', 'report none --out x',\n"
        "       'export none --format hf --out x', 'plan demo --topology v9:2x2', 'plan nowhere --topology v5e:2x2')\n"
        "errors = {main(a.split()) for a in bad}\n"
        "heavy = [m for m in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain') if m in sys.modules]\n"
        "print('RESULT', codes, errors, heavy)\n"
    )
    assert "RESULT {0} {2} []" in done.stdout, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command, capsys):
    assert set(app.commands) == set(COMMANDS)
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:" in text and f"jaxcl {command}" in text.split("Example:")[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lst", "unknown command 'lst'; did you mean 'list'?"),
        ("xyzzy", "accepted: bench, demo, doctor"),
        ("list methds", "'methds'; did you mean 'methods' or 'metrics'?"),
        ("list methods --jsn", "unknown option '--jsn' in 'jaxcl list'; did you mean '--json'?"),
        ("list --unheard-of-thing metrics", "accepted: --debug, --help, --json"),
        ("list", "Missing argument"),
        ("list metrics streams", "unexpected extra argument (streams)"),
        ("run x --set", "'--set' requires an argument"),
        ("report", "Missing argument 'RUN...'"),
        ("report somewhere", "Missing option '--out'"),
        ("score absent.json", "no such file: absent.json"),
        ("fetch smolm2-135m-instruct", "did you mean 'smollm2-135m-instruct'?"),
        ("report absent-run --out o", "absent-run"),
        ("run olora_ordr1", "unknown experiment 'olora_ordr1'"),
        ("export absent-run --format hf --out o", "no run at 'absent-run'"),
        ("export . --format pft --out o", "unknown format 'pft' in --format; did you mean 'peft'?"),
    ],
)
def test_bad_requests_say_one_line_and_exit_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxcl: ") and err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def command(monkeypatch):
    """Adds a command `boom` that does what a test says."""

    def add(do):
        monkeypatch.setitem(app.commands, "boom", click.Command("boom", callback=do))

    return add


def raiser(error):
    def do():
        raise error

    return do


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RunFailed("NaN in the loss"), 1, "NaN in the loss"),
        (RequestError("two\nlines"), 2, "two lines"),
        (Interrupted("saved at step 5"), 75, "saved at step 5"),
        (KeyboardInterrupt(), 75, "interrupted"),
        (OSError(28, "No space left on device", "runs/x"), 1, "No space left on device"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_what_a_failure_says(error, status, said, command, capsys):
    command(raiser(error))
    assert main(["boom"]) == status
    err = capsys.readouterr().err
    assert err.startswith("jaxcl: ") and err.count("\n") == 1 and said in err
    for args in (["boom", "--debug"], ["--debug", "boom"]):
        assert main(args) == status
        err = capsys.readouterr().err
        assert "Traceback" in err and said in err.splitlines()[-1]


def test_status_of_a_command_is_returned(command):
    command(lambda: 75)
    assert main(["boom"]) == 75
    command(raiser(SystemExit(3)))
    assert main(["boom"]) == 3


def test_chatter_of_libraries_stays_away(command, capsys):
    def chatter():
        logging.getLogger("absl").error("absl speaks")
        logging.getLogger("some.new.library").critical("another")
        warnings.warn("deprecated", stacklevel=1)
        print("result")
        levels.append(logging.root.manager.disable)

    levels: list[int] = []
    command(chatter)
    assert main(["boom"]) == 0
    out, err = capsys.readouterr()
    assert out == "result\n" and err == ""
    assert logging.root.manager.disable == logging.NOTSET  # as it was before
    assert main(["boom", "--debug"]) == 0
    assert levels == [logging.CRITICAL, logging.NOTSET]  # --debug lets libraries speak


def test_quiet_sets_the_log_level_before_jax_is_imported():
    done = python(
        "import os\n"
        "from jaxcl.cli.quiet import quiet\n"
        "os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)  # jax sets it for its children\n"
        "os.environ['GRPC_VERBOSITY'] = 'INFO'\n"
        "with quiet():\n"
        "    import sys; assert 'jax' not in sys.modules\n"
        "    print(os.environ['TF_CPP_MIN_LOG_LEVEL'], os.environ['GRPC_VERBOSITY'])\n"
    )
    assert done.stdout == "3 INFO\n" and done.stderr == ""


def test_a_closed_pipe_is_no_failure():
    code = "import sys\nfrom jaxcl.cli import main\nsys.exit(main(['list', 'metrics', '--json']))"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout is not None and p.stderr is not None
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 0 and err == b""


def test_list_methods_json_has_the_fields_of_the_contract(capsys):
    assert main(["list", "methods", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    fields = {"name", "kind", "group", "slots", "card", "paper", "module", "keeps", "packs"}
    assert all(r.keys() == fields for r in rows.values())
    assert {r["kind"] for r in rows.values()} == {"method", "transform", "baseline"}
    assert rows["olora"]["card"] == "cft/o-lora" and "loss" in rows["olora"]["slots"]
    assert rows["replay"]["keeps"] != "nothing" and rows["ewc"]["keeps"] == "nothing"
    assert rows["joint"]["keeps"] == "all"


@pytest.mark.parametrize("what", ["methods", "streams", "models", "metrics", "experiments"])
def test_plain_lists(what, capsys):
    assert main(["list", what]) == 0
    assert capsys.readouterr().out.split()[0] == "name"


def test_list_metrics_and_streams_json(capsys):
    assert main(["list", "metrics", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "convention", "card"} <= rows[0].keys()
    assert not {"bwt", "fwt", "forgetting"} & {r["name"].lower() for r in rows}
    assert main(["list", "streams", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all({"name", "scenario", "stages", "metric", "regime", "card"} <= r.keys() for r in rows)


def test_score_as_table_and_json(card, capsys, tmp_path):
    assert main(["score", str(card)]) == 0
    text = capsys.readouterr().out
    assert "0.7325" in text and "bwt_over_T_minus_1" in text and "-0.0733" in text
    assert main(["score", "--json", str(card)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["fgt_max"]["value"] == pytest.approx(0.093333333, abs=1e-6)
    card.write_text(json.dumps(card_file(rows=R[:1], row0=None)))
    assert main(["score", "--json", str(card)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["partial"] and found["metrics"]["bwt_over_T"]["value"] is None
    assert found["metrics"]["zero_shot_gain"] | {"convention": ""} == {
        "value": None,
        "reason": "needs row0",
        "convention": "",
        "papers": "",
    }


def test_score_of_a_run_directory_has_intervals(tmp_path, capsys):
    import numpy as np

    write_run(tmp_path / "run", (np.random.default_rng(0).random((4, 3, 50)) < 0.5).astype(float))
    assert main(["score", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lo, hi = found["metrics"]["aa"]["interval"]
    assert lo < found["metrics"]["aa"]["value"] < hi and found["intervals"]["resamples"] == 2000


def test_doctor_names_devices_versions_and_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    folded = str(tmp_path)[:40]  # the table folds what is longer than its column
    for word in ("python", "jax ", "devices", "no such directory", folded, "extra oracle"):
        assert word in text, word
