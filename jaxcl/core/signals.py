"""SIGTERM and SIGINT as a request to save and stop, and the count of compilations."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxcl.errors import Interrupted


class StopRequest:
    """While active, the first signal only sets `requested`; a second one of the same kind acts as usual.

    Of several processes the one that gets SIGTERM tells the others through JAX, which names the poll at which all stop.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.polls = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, self._old.get(number, signal.SIG_DFL))

    def poll(self) -> bool:
        """Whether to save and stop now. All processes ask equally often and get the same answers."""
        if jax.process_count() > 1 and not self.requested:
            self.polls += 1
            if multihost_utils.reached_preemption_sync_point(self.polls):
                self.requested = signal.SIGTERM.name
        return self.requested is not None

    def check(self) -> None:
        """Raises Interrupted when a signal came; for places where nothing new needs saving."""
        if self.poll():
            raise Interrupted(f"stopped by {self.requested}; everything is saved, the same command continues")


class Compilations:
    """XLA compilations of this process, counted by JAX itself. by_name: {jitted function: count}."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            name = str(kwargs.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            self.by_name[name] = self.by_name.get(name, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
