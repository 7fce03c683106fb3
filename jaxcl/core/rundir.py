"""A run directory: config.json, matrix.json, metrics.json, predictions/, log.jsonl, events/, checkpoints/."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.core.bucket import CHECKPOINTS, Mirror, remote
from jaxcl.core.checkpoint import write_atomic
from jaxcl.errors import RequestError, RunFailed


def dump(value: Any) -> str:
    """JSON as we write it everywhere: stable order as given, no NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """One line per leaf that differs between two JSON values."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [*ours, *(k for k in theirs if k not in ours)]
        return [d for k in keys for d in differences(ours.get(k), theirs.get(k), f"{at}.{k}" if at else str(k))]
    return [] if ours == theirs else [f"{at} is {json.dumps(theirs)} there and {json.dumps(ours)} here"]


class RunDir:
    """Files of one run. Only process 0 writes; nothing is made before `create`. Where ``home`` is in a bucket, ``path``
    is a local copy of all but the checkpoints, pushed whenever something is written or flushed."""

    def __init__(self, home: Path, process: int = 0):
        self.mirror = Mirror(home) if remote(home) else None
        self.home, self.path, self.writes = home, self.mirror.here if self.mirror else home, process == 0
        self.log_bytes = 0
        self.follow: Callable[[Path], Any] | None = None  # makes one more taker of the scalars, told the events' folder
        self._log: Any = None
        self._takers: list[Any] = []  # each with add, flush, close, as `Events`

    @property
    def checkpoints(self) -> Path:
        return self.home / CHECKPOINTS

    def read(self, name: str) -> Any:
        """The JSON of one of our files, None where it is absent. RequestError when it is not JSON."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise RequestError(f"{file} is not JSON ({e}); remove the directory or choose another --out") from e

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a directory that belongs to something else. ``config``: what must be equal to continue."""
        if self.mirror:
            self.mirror.pull()
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"--out {self.home} is a file; give a directory")
        old = self.read("config.json")
        if old is None:
            if self.path.exists() and any(self.path.iterdir()):
                raise RequestError(f"--out {self.home} is not empty and holds no run; give a new directory")
            return
        found = differences(config, {k: old.get(k) for k in config})
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise RequestError(
                f"--out {self.home} holds a run of another config: {'; '.join(found[:3])}{more}; give another directory"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the directory and writes config.json, unless it is there."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "predictions").mkdir(exist_ok=True)
            if not (self.path / "config.json").exists():
                write_atomic(self.path / "config.json", dump(config))
            self._push()
        except OSError as e:
            raise RequestError(f"cannot write to --out {self.home}: {e.strerror or e}") from e

    def _push(self) -> None:
        if self.mirror and self.writes:
            self.mirror.push()

    def write(self, name: str, value: Any) -> None:
        """One of our JSON files, replaced at once."""
        if self.writes:
            try:
                write_atomic(self.path / name, dump(value))
                self._push()
            except OSError as e:
                raise RunFailed(f"cannot write {self.home / name}: {e.strerror or e}") from e

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
        self._log = file.open("r+b" if file.exists() else "w+b")
        self._log.truncate(size)
        self._log.seek(size)
        self.log_bytes = size
        self._takers = [Events(self.path / "events", step if size else None)]
        if self.follow is not None:
            self._takers.append(self.follow(self.path / "events"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one object; it reaches the disk with the next `flush`."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.log_bytes += len(line)
        if self._log is not None:
            self._log.write(line)
            for name, value in record.items():
                if isinstance(value, float):
                    self._add(f"train/{name}", value, record["step"])

    def _add(self, tag: str, value: float, step: int) -> None:
        for taker in self._takers:
            taker.add(tag, value, step)

    def flush(self) -> None:
        """To the disk, before a checkpoint claims these bytes. Raises RunFailed when it is full."""
        if self._log is not None:
            try:
                self._log.flush()
                os.fsync(self._log.fileno())
                for taker in self._takers:
                    taker.flush()
                self._push()
            except OSError as e:
                raise RunFailed(f"cannot write {self.home / 'log.jsonl'}: {e.strerror or e}") from e

    def close(self) -> None:
        for file in (self._log, *self._takers):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk was named before; what was saved stands
                    file.close()
        self._log, self._takers = None, []
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
        temporary = file.with_name(file.name + ".tmp")
        with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as f:
            for item in items:
                f.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
        temporary.replace(file)


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
