"""`jaxcl run`: from an experiment's name to a finished, or continued, run directory."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxcl import experiment_files
from jaxcl.caches import cache_folder
from jaxcl.core import compile_cache, tracking
from jaxcl.core.bucket import near, place, remote
from jaxcl.core.config import as_json, override, short_hash
from jaxcl.core.experiment import Experiment
from jaxcl.core.loop import Loop
from jaxcl.core.processes import permitted
from jaxcl.core.progress import Reporter
from jaxcl.core.rundir import RunDir, differences
from jaxcl.core.signals import StopRequest
from jaxcl.errors import Interrupted, RequestError

_PACKAGES = ("jaxcl", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run_experiment(
    name_or_path: str,
    overrides: Sequence[str] = (),
    data: str | None = None,
    out: str | None = None,
    debug: bool = False,
    wandb: str | None = None,
) -> int:
    """Runs or continues an experiment; returns 0. ``wandb``: a Weights & Biases project that takes the scalars too.
    Raises JaxclError with the exit status otherwise."""
    follow = tracking.follow(wandb) if wandb else None
    exp, folder, name, config = opened(name_or_path, overrides, data, out)
    train(exp, folder, name=name, config=config, follow=follow)
    return 0


def opened(
    name_or_path: str, overrides: Sequence[str], data: str | None, out: str | None, suffix: str = ""
) -> tuple[Experiment, Path, str, Any]:
    """(the experiment built, its run directory, its name, its resolved Config as JSON). Raises RequestError."""
    module, cfg, name, plain = configured(name_or_path, overrides, data)
    folder = place(out) if out else Path("runs") / name / (short_hash(_what(plain)) + suffix)
    return module.build(cfg), folder, name, plain


def configured(name_or_path: str, overrides: Sequence[str], data: str | None) -> tuple[ModuleType, Any, str, Any]:
    """(the experiment's module, its resolved Config, its name, the Config as JSON). Raises RequestError."""
    given = data or os.environ.get("JAXCL_DATA", "")
    if remote(given):
        data = str(near(given, cache_folder()))
    if data is not None:
        if not Path(data).is_dir():
            raise RequestError(f"--data {data}: no such directory")
        os.environ["JAXCL_DATA"] = data
    compile_cache.enable()
    module = experiment_files.load(name_or_path)
    cfg = override(module.Config(), overrides)
    name = Path(name_or_path).stem if name_or_path.endswith(".py") else Path(name_or_path).name
    name = Path(name_or_path).resolve().parent.name if name == "experiment" else name
    return module, cfg, name, as_json(cfg)


def train(
    exp: Experiment,
    out: Path,
    *,
    name: str = "run",
    config: Any = None,
    reporter: Reporter | None = None,
    follow: tracking.Follow | None = None,
) -> Loop | None:
    """Trains an experiment in a run directory, continuing what is there. None when it was finished already.

    follow: makes one more taker of the scalars that the events have (`jaxcl.core.tracking`)."""
    reporter = reporter or Reporter(quiet=jax.process_index() > 0)
    rundir = RunDir(place(out), jax.process_index())
    identity, facts = identity_of(exp, name, config), facts_of(exp)
    try:
        permitted(lambda: rundir.check(identity))
        old = rundir.read("config.json")
        finished = old is not None and rundir.read("metrics.json") is not None
        if finished:
            reporter.say(f"{out} is finished; its numbers are in metrics.json")
            return None
        if isinstance(jax.numpy.zeros(()), jax.core.Tracer):  # `jaxcl plan`: nothing is computed, so nothing is saved
            raise RequestError(f"a plan computes nothing, but {out} has to be trained first; run it, then plan")
        permitted(rundir.check_writable)  # all have looked before the first writes
        for line in differences(facts, {k: (old or facts).get(k) for k in facts}):
            reporter.say(f"note: {line}")
        if follow is not None:
            rundir.follow = functools.partial(follow, {**identity, **facts})
        with StopRequest() as stop:
            loop = Loop(exp, rundir, reporter, stop, {**identity, **facts})
            try:
                loop.run()
            except Interrupted:
                loop.store.wait()  # what was being saved counts
                raise
            finally:
                reporter.stop()
                loop.compiled.compilations.close()
    finally:
        rundir.close()
    reporter.say(f"done: {out}")
    return loop


def identity_of(exp: Experiment, name: str, config: Any) -> dict[str, Any]:
    """What must be equal for a run directory to be this run's."""
    methods = {m.name: _plain(m.hparams) for m in exp.methods}
    return {"experiment": name, "config": _what(config or {}), "methods": methods, "source": _plain(exp.source)}


def facts_of(exp: Experiment) -> dict[str, Any]:
    """What is written down beside it."""
    devices, mesh = [str(d) for d in jax.devices()], dict(exp.mesh) if exp.mesh else None
    return {"seed": exp.seed, "versions": _versions(), "commit": _commit(), "devices": devices, "mesh": mesh}


def _what(config: dict[str, Any]) -> dict[str, Any]:
    """A Config's values without ``mesh``: where a run is computed may change on the way."""
    return {k: v for k, v in config.items() if k != "mesh"}


def _plain(value: Any) -> Any:
    import json

    try:
        return json.loads(json.dumps(dict(value)))
    except TypeError as e:
        raise RequestError(f"not a plain value in {dict(value)}: {e}; methods take numbers, strings, lists") from e


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The checkout's commit where jaxcl runs from one, with a mark when it was changed."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        ask = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True, timeout=10)  # noqa: E731
        head = ask("rev-parse", "HEAD").stdout.strip()
        dirty = ask("status", "--porcelain", "-uno").stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty.strip() else "") if head else None
