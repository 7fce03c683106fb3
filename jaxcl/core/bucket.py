"""Runs in a bucket (gs://...), which holds whole objects: nothing is appended to, locked or renamed there.

Checkpoints go there directly: Orbax and etils know buckets, and every process writes its own part. The other files of a
run are small and have one writer: they live in a local folder whose changes a `Mirror` copies out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcl.errors import RequestError, needs_extra

_ADDRESS = re.compile(r"gs:/+([^/]+)(/.*)?$")  # pathlib makes one slash of two
CHECKPOINTS = "checkpoints"
PACKAGES = ("gcsfs", "google.cloud.storage")


def remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a bucket."""
    return str(path).startswith("gs:/")


def place(path: str | os.PathLike[str]) -> Path:
    """A path on a disk (pathlib) or in a bucket (etils, with the same interface). RequestError: an address without a
    bucket, and where the packages are absent."""
    if not remote(path):
        return Path(path)
    found = _ADDRESS.match(str(path))
    if not found:
        raise RequestError(f"{path}: no bucket; accepted: gs://BUCKET/FOLDER")
    for package in PACKAGES:
        if not _installed(package):
            raise needs_extra(package, "bucket")
    import fsspec
    from etils import epath

    # Orbax and TensorStore write past gcsfs, other processes too: a remembered listing would be wrong.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    there: Any = epath.Path(f"gs://{found.group(1)}{(found.group(2) or '').rstrip('/')}")
    return there


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


# what pathlib has and buckets have not, or under another name


def files(folder: Path) -> Iterator[Path]:
    """Every file under a folder; what another thread takes away meanwhile is passed over. One request for a bucket."""
    if remote(folder):
        yield from _listing(folder)
        return
    for at, _, names in os.walk(folder):
        yield from (Path(at, name) for name in names)


def _listing(folder: Path) -> dict[Path, int]:
    """{file: size} of all below a folder in a bucket."""
    import fsspec

    there = fsspec.filesystem("gs", finalize_on_close=True)  # the one that etils has
    return {place("gs://" + name): info["size"] for name, info in there.find(str(folder), detail=True).items()}


def size(file: Path) -> int:
    """Of a file, in bytes."""
    found: Any = file.stat()
    return int(found.length if remote(file) else found.st_size)


def remove(folder: Path) -> None:
    """A folder with all that it holds, as far as that can be."""
    if not remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    there: Any = folder
    there.rmtree(missing_ok=True)


def near(address: str, cache: Path) -> Path:
    """A copy of a folder in a bucket, below ``cache``; only what is absent there, or of another size, is fetched.
    Raises RequestError where the bucket has no such folder or cannot be read."""
    source = place(address)
    here = cache / "buckets" / str(source).removeprefix("gs://")
    try:
        listing = _listing(source)
        for item, length in listing.items():
            file = here / item.relative_to(source)
            if not file.is_file() or file.stat().st_size != length:
                file.parent.mkdir(parents=True, exist_ok=True)
                half = file.with_name(f"{file.name}.{os.getpid()}.tmp")
                half.write_bytes(item.read_bytes())
                half.replace(file)
    except Exception as e:  # gcsfs, google-auth and aiohttp have no common base of their errors
        raise RequestError(f"{address} cannot be fetched: {' '.join(str(e).split())}") from e
    if not listing:
        raise RequestError(f"{address}: no such folder, or it is empty")
    return here


class Mirror:
    """A local folder that stands for a run directory in a bucket, its checkpoints left out."""

    def __init__(self, there: Path):
        self.there, self.here = there, Path(tempfile.mkdtemp(prefix="jaxcl-run-"))
        self._sent: dict[Path, tuple[int, int]] = {}

    def pull(self) -> None:
        """Fetches what is there. Raises RequestError where the bucket cannot be read."""
        try:
            for item in files(self.there):
                name = item.relative_to(self.there)
                if name.parts[0] != CHECKPOINTS:
                    file = self.here / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(item.read_bytes())
        except Exception as e:  # gcsfs, google-auth and aiohttp have no common base of their errors
            raise RequestError(f"--out {self.there} cannot be read: {' '.join(str(e).split())}") from e
        self._sent = {file: _stamp(file) for file in self._files()}

    def push(self) -> None:
        """Copies out what has changed since. Raises OSError where the bucket does not take it."""
        for file in self._files():
            stamp = _stamp(file)
            if self._sent.get(file) != stamp:
                try:
                    (self.there / str(file.relative_to(self.here))).write_bytes(file.read_bytes())
                except Exception as e:
                    raise OSError(f"{self.there}: {' '.join(str(e).split())}") from e
                self._sent[file] = stamp

    def remove(self) -> None:
        """The local folder; the bucket keeps what was pushed."""
        shutil.rmtree(self.here, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(f for f in files(self.here) if not f.name.endswith(".tmp"))


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
