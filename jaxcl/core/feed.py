"""Where a step's batch comes from: the phase's data, or a rollout made of it that serves several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcl.core.types import Batch, Phase, State

Make = Callable[[State, Batch], tuple[State, Batch]]


class Feed:
    """Batches of a phase, by the number of the step. ``data``: an iterator of `jaxcl.data.pipeline`. ``rollout`` is
    the one in use and part of a step's checkpoint, ``made_at`` the step it was made for (-1: none yet); ``read`` the
    last batch of data, as it came."""

    def __init__(self, data: Any, every: int, make: Make, place: Callable[[Batch], Batch]):
        self.data, self.every, self.make, self.place = data, every, make, place
        self.rollout: Batch = {}
        self.made_at = -1
        self.read: Batch = {}

    def first(self, step: int, state: State) -> tuple[State, Batch]:
        """The batch that the next call of `take` will give, for its shapes; the data's position stays."""
        if self.every:
            return self.take(step, state)
        position = self.data.get_state()
        batch = self.place(next(self.data))
        self.data.set_state(position)
        return state, batch

    def take(self, step: int, state: State) -> tuple[State, Batch]:
        """The batch of a step, on the devices; a rollout is made every ``every`` steps and changes live memory."""
        if not self.every:
            self.read = next(self.data)
            return state, self.place(self.read)
        if step % self.every == 0 and self.made_at != step:
            self.read = next(self.data)
            state, self.rollout = self.make(state, self.place(self.read))
            self.made_at = step
        return state, self.rollout


def lengths(phase: Phase, counted: int) -> tuple[int, int]:
    """(steps, batches of data) of a phase whose data fill ``counted`` batches, or which counts its steps itself."""
    every = max(1, phase.collect_every)
    steps = counted if phase.steps is not None else counted * every
    return steps, -(-steps // every)
