"""Weights & Biases for those who ask for it: the scalars of the events, once more.

Everything that wandb reads from its environment holds (WANDB_MODE=offline, WANDB_ENTITY, ...). A run that continues
goes on in the same wandb run; points between the last checkpoint and a kill are there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxcl.errors import RequestError, needs_extra

Follow = Callable[[Mapping[str, Any], Path], Any]
"""(the run's config, the folder of its events) -> a taker of scalars, see `rundir.Events`."""

_AXES = {"train": "step", "eval": "stages"}  # what the x axis of each family counts


def follow(project: str) -> Follow:
    """Makes a wandb run of ``project`` when the log opens. Raises RequestError at once where the package is absent."""
    try:
        import wandb
    except ImportError as e:
        raise needs_extra("wandb", "tracking") from e

    def start(config: Mapping[str, Any], events: Path) -> Wandb:
        run = events.parent
        first = min(events.iterdir()).name.rsplit(".", 1)[-1]  # its time: the same whenever the run continues
        name = f"{config['experiment']}/{run.name}"
        try:
            made = wandb.init(
                project=project, name=name, id=first, resume="allow", dir=str(run), config=dict(config),
                settings={"silent": True},
            )  # fmt: skip
        except Exception as e:  # wandb has no common base of its errors
            raise RequestError(f"wandb does not start: {e}; WANDB_MODE=offline works without an account") from e
        return Wandb(made)

    return start


class Wandb:
    """Takes scalars one by one and logs those of one step together."""

    def __init__(self, run: Any):
        self._run, self._at = run, ("", 0)
        self._row: dict[str, float] = {}
        for family, axis in _AXES.items():
            run.define_metric(f"{family}/{axis}")
            run.define_metric(f"{family}/*", step_metric=f"{family}/{axis}")

    def add(self, tag: str, value: float, step: int) -> None:
        """One point of one curve."""
        at = (tag.split("/", 1)[0], step)
        if at != self._at:
            self.flush()
            self._at = at
        self._row[tag] = value

    def flush(self) -> None:
        """Logs what has been gathered."""
        if self._row:
            family, step = self._at
            self._run.log({**self._row, f"{family}/{_AXES[family]}": step})
            self._row = {}

    def close(self) -> None:
        self.flush()
        self._run.finish()
