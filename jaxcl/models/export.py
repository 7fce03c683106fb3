"""`jaxcl export`: the model a run ends with, as a folder that transformers or PEFT loads."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxcl.errors import RequestError, RunFailed, unknown

FORMATS = ("hf", "peft")


def export(run: str, style: str, out: str, experiment: str | None = None) -> list[str]:
    """Writes the last finished stage of a run directory to ``out``; returns what a user should know, line by line.

    run: a run directory, or a model's registered name for its weights as they are (``hf`` only: the base that an
    adapter belongs to). style: ``hf``, a whole model, adapters merged in float32; ``peft``, the adapters alone.
    experiment: the run's experiment file, where weights made by the run's own code must be made again.

    Raises RequestError, see `check`, `export_run.finished` and the two writers; RunFailed on a full disk. Nothing
    half-written is left in either case.
    """
    check(run, style, out)
    from jaxcl.models import export_run, fetch
    from jaxcl.models.export_hf import write_hf
    from jaxcl.models.export_peft import write_peft

    if run in fetch.MODELS:
        model, params, tokenizer, _ = fetch.load(run)
        with folder_at(Path(out)) as folder:
            return write_hf(folder, model.spec, params, tokenizer)
    done = export_run.finished(Path(run), experiment)
    with folder_at(Path(out)) as folder:
        if style == "hf":
            notes = write_hf(folder, done.spec, done.params, done.tokenizer)
        else:
            notes = write_peft(folder, done.spec, done.params, done.base, done.source, done.tokenizer)
    return [*done.notes, *notes]


def check(run: str, style: str, out: str) -> None:
    """Refuses what can be refused without reading weights (and without importing jax)."""
    from jaxcl.models.fetch import MODELS

    if style not in FORMATS:
        raise unknown("format", style, FORMATS, where="--format")
    if run in MODELS and style != "hf":
        raise RequestError(f"{run} is a model, it has no adapters; accepted: a run directory, or --format hf")
    if run not in MODELS and not (Path(run) / "config.json").is_file():
        raise RequestError(f"no run at {run!r}: {Path(run) / 'config.json'} is not there; give a run directory")
    vacant(Path(out))


def vacant(out: Path) -> None:
    """RequestError unless ``out`` is absent or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise RequestError(f"--out {out} {what}; give a new directory")


@contextlib.contextmanager
def folder_at(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well and vanishes when it does not."""
    from safetensors import SafetensorError

    out = out.absolute()
    above = next(p for p in out.parents if p.exists())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise RequestError(f"cannot write to --out {out}: {error.strerror}") from None
    try:
        made = room / "made"
        made.mkdir()
        yield made
        vacant(out)
        os.replace(made, out)  # over an empty folder too
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
        for parent in [p for p in out.parents if above in p.parents]:
            with contextlib.suppress(OSError):
                parent.rmdir()  # made for nothing
