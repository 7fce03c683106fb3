"""Progress over several runs: one bar of all training steps, with the time that everything still needs."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from jaxcl.core.progress import Reporter


class Bar(Reporter):
    """A reporter for many runs. work: {name of a run: its training steps}, in order."""

    def __init__(self, work: Mapping[str, int], quiet: bool = False):
        super().__init__(quiet)
        self.work = dict(work)
        self.total = sum(self.work.values())
        self.name = ""
        self.done = self.trained = 0  # steps behind us, and those of them made by this process
        self.began = time.monotonic()

    def part(self, name: str) -> None:
        """The run that starts now; all before it are done."""
        names = list(self.work)
        self.name = f"{names.index(name) + 1}/{len(names)} {name}"
        self.done = sum(self.work[n] for n in names[: names.index(name)])

    def say(self, text: str) -> None:
        super().say(f"{self.name}: {text}" if self.name else text)

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._label = label
        if self._bar is None and self.console.is_terminal and not self.quiet:
            left = TextColumn("{task.fields[left]}")
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), left)
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, left="")
        self.update(done)

    def update(self, done: int, note: str = "") -> None:
        """A step further when there is a note: training says its loss, evaluation says nothing."""
        if note:
            self.done, self.trained = self.done + 1, self.trained + 1
        label = f"{self.name}: {self._label} {note}".rstrip()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=label, completed=self.done, left=self.left())
        elif not self.quiet and time.monotonic() - self._last > self.every:
            self._last = time.monotonic()
            self.console.print(f"  {label}, {self.done / self.total:.0%} of all, {self.left()}", soft_wrap=True)

    def left(self) -> str:
        """Time that the remaining steps need at the mean pace of this process, compilations included."""
        if not self.trained:
            return "compiling"
        pace = (time.monotonic() - self.began) / self.trained
        minutes, seconds = divmod(round(pace * max(self.total - self.done, 0)), 60)
        return f"about {minutes}:{seconds:02} left"

    def stop(self) -> None:
        """The loop closes its bar after every stretch; ours stays until `close`."""

    def close(self) -> None:
        super().stop()
        self.name = ""
