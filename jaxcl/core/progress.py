"""Progress for people: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """One bar at a time. On a pipe or in a log, a line every ``every`` seconds instead."""

    def __init__(self, quiet: bool = False, every: float = 20.0):
        self.quiet, self.every = quiet, every
        self.console = Console(file=sys.stdout, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0
        self._label, self._total = "", 0

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self.quiet:
            (self._bar.console if self._bar else self.console).print(text, markup=False, soft_wrap=True)

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Opens a bar of ``total`` steps, ``done`` of which are behind us."""
        self.stop()
        self._label, self._total, self._last = label, total, time.monotonic()
        if self.quiet or not self.console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        rest = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, *rest, console=self.console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """Moves the bar to ``done``."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif not self.quiet and time.monotonic() - self._last > self.every:
            self._last = time.monotonic()
            self.say(f"  {self._label}: {done}/{self._total} {note}")

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def counter(self, check: Callable[[], None]) -> Callable[[int, int], None]:
        """A callback ``(done, total)`` for evaluators, which may also be stopped by ``check``."""

        def advance(done: int, total: int) -> None:
            check()
            self.update(done)

        return advance
