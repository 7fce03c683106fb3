"""A run directory: config.json, matrix.json, metrics.json, predictions/, log.jsonl, events/, checkpoints/."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.core.bucket import CHECKPOINTS, Mirror, remote
from jaxcl.core.files import HALF, write_atomic
from jaxcl.core.lock import Lock
from jaxcl.errors import RequestError, RunFailed
from jaxcl.metrics.matrix_file import load_json


def dump(value: Any) -> str:
    """JSON as we write it everywhere: stable order as given, no NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """One line per leaf that differs between two JSON values."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [*ours, *(k for k in theirs if k not in ours)]
        return [d for k in keys for d in differences(ours.get(k), theirs.get(k), f"{at}.{k}" if at else str(k))]
    return [] if ours == theirs else [f"{at} is {json.dumps(theirs)} there and {json.dumps(ours)} here"]


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Says which file a full or failing disk did not take. Raises RunFailed."""
    try:
        yield
    except OSError as e:
        raise RunFailed(f"cannot write {file}: {e.strerror or e}") from e


class RunDir:
    """Files of one run. Only process 0 writes; nothing is made before `create`. From `check` or `create` to `close`
    no other process can work there. Where ``home`` is in a bucket, which knows no locks, ``path`` is a local copy of
    all but the checkpoints, pushed whenever something is written or flushed."""

    def __init__(self, home: Path, process: int = 0):
        self.mirror = Mirror(home) if remote(home) else None
        self.home, self.path, self.writes = home, self.mirror.here if self.mirror else home, process == 0
        self.log_bytes = 0
        self._lock = Lock(self.path)
        self.follow: Callable[[Path], Any] | None = None  # makes one more taker of the scalars, told the events' folder
        self._log: Any = None
        self._takers: list[Any] = []  # each with add, flush, close, as `Events`

    @property
    def checkpoints(self) -> Path:
        return self.home / CHECKPOINTS

    def read(self, name: str) -> Any:
        """The JSON object of one of our files, None where it is absent. RequestError when it is none."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            value = load_json(file)
        except RequestError as e:
            raise RequestError(f"{e}; remove the directory or choose another --out") from e
        if not isinstance(value, dict):
            raise RequestError(f"{file} holds no JSON object; remove the directory or choose another --out")
        return value

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a directory that belongs to something else, or in which another process is at work. ``config``: what
        must be equal to continue."""
        if self.mirror:
            self.mirror.pull()
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"--out {self.home} is a file; give a directory")
        if self.path.exists() and self.writes:
            self._lock.take()
        old = self.read("config.json")
        if old is None:
            if self.path.exists() and any(f.name != "config.json" + HALF for f in self.path.iterdir()):
                raise RequestError(f"--out {self.home} is not empty and holds no run; give a new directory")
            return
        found = differences(config, {k: old.get(k) for k in config})
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise RequestError(
                f"--out {self.home} holds a run of another config: {'; '.join(found[:3])}{more}; give another directory"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the directory and writes config.json, unless it is there. Raises RequestError where that cannot be."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            began = self._lock.held
            self._lock.take()
            if not (self.path / "config.json").exists():
                write_atomic(self.path / "config.json", dump(config))
            elif not began:
                raise RequestError(f"--out {self.home}: another process has begun a run there; give another directory")
            (self.path / "predictions").mkdir(exist_ok=True)
            self._push()
        except OSError as e:
            raise RequestError(f"cannot write to --out {self.home}: {e.strerror or e}") from e

    def _push(self) -> None:
        if self.mirror and self.writes:
            self.mirror.push()

    def check_writable(self) -> None:
        """Refuses a directory that can be read only, before anything in it is touched."""
        if self.writes and self.path.exists() and not os.access(self.path, os.W_OK):
            raise RequestError(f"cannot write to --out {self.home}: it is read-only; give another directory")

    def write(self, name: str, value: Any) -> None:
        """One of our JSON files, replaced at once. Raises RunFailed where the disk does not take it."""
        if self.writes:
            with writing(self.path / name):
                write_atomic(self.path / name, dump(value))
                self._push()

    # the log

    def open_log(self, size: int, step: int = 0) -> None:
        """Continues the log at ``size`` bytes; what a killed process wrote after its last save is cut off.

        TensorBoard's events, which do hold times, are told to forget the steps from ``step`` on. Raises RequestError
        when there is less than ``size``: what was lost cannot be had again.
        """
        if not self.writes:
            return
        file = self.path / "log.jsonl"
        there = file.stat().st_size if file.exists() else 0
        if there < size:
            raise RequestError(
                f"{file} has {there} bytes, the checkpoint was written after {size}; "
                "put the log back, or give another --out"
            )
        try:
            self._log = file.open("r+b" if file.exists() else "w+b")
            self._log.truncate(size)
            self._log.seek(size)
            self._takers = [Events(self.path / "events", step if size else None)]
        except OSError as e:
            raise RequestError(f"cannot write to --out {self.home}: {e.strerror or e}") from e
        self.log_bytes = size
        if self.follow is not None:
            self._takers.append(self.follow(self.path / "events"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one object; it reaches the disk with the next `flush`."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.log_bytes += len(line)
        if self._log is not None:
            with writing(self.path / "log.jsonl"):
                self._log.write(line)
            for name, value in record.items():
                if isinstance(value, float):
                    self._add(f"train/{name}", value, record["step"])

    def _add(self, tag: str, value: float, step: int) -> None:
        with writing(self.path / "events"):
            for taker in self._takers:
                taker.add(tag, value, step)

    def flush(self) -> None:
        """To the disk, before a checkpoint claims these bytes. Raises RunFailed when it is full."""
        if self._log is not None:
            with writing(self.path / "log.jsonl"):
                self._log.flush()
                os.fsync(self._log.fileno())
            with writing(self.path / "events"):
                for taker in self._takers:
                    taker.flush()
                self._push()

    def close(self) -> None:
        for file in (self._log, *self._takers):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk was named before; what was saved stands
                    file.close()
        self._log, self._takers = None, []
        self._lock.release()
        if self.mirror:
            self.mirror.remove()

    # measurements

    def measured(self, row: int, values: Mapping[str, float | None]) -> None:
        """A row of the matrix for TensorBoard; the step is the number of stages behind it."""
        for name, value in values.items():
            if value is not None:
                self._add(f"eval/{name}", value, row)

    def write_predictions(self, eval_id: str, row: int, items: Sequence[Mapping[str, Any]]) -> None:
        """predictions/<eval>.row<k>.jsonl.gz, row 0 being the model before any training."""
        if not self.writes:
            return
        file = self.path / "predictions" / f"{eval_id.replace('/', '__')}.row{row}.jsonl.gz"
        temporary = file.with_name(file.name + HALF)
        try:
            with writing(file):
                with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as f:
                    for item in items:
                        f.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
                temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


class Events:
    """Scalars for TensorBoard, written here and now: tensorboardX's own writer has a thread that outlives errors."""

    def __init__(self, folder: Path, purge: int | None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._event = Event
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge is not None:
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._write(Event(wall_time=time.time(), step=purge, session_log=start))

    def _write(self, event: Any) -> None:
        self._file.write(event.SerializeToString())

    def add(self, tag: str, value: float, step: int) -> None:
        """One point of one curve."""
        event = self._event(wall_time=time.time(), step=step)
        event.summary.value.add(tag=tag, simple_value=value)
        self._write(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
