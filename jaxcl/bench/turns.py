"""Two sides in turn, and the ratios within each round: what a busy machine does to both at once cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Round(NamedTuple):
    """Wall and processor seconds of both sides."""

    base: float
    side: float
    base_cpu: float
    side_cpu: float


def in_turn(base: Callable[[], None], side: Callable[[], None], rounds: int, warm: int) -> list[Round]:
    """The counted rounds: both sides once in each, first one, then the other first. ``warm`` more go before them."""
    found = []
    for number in range(warm + rounds):
        pair = [base, side] if number % 2 == 0 else [side, base]
        taken = {call: timed(call) for call in pair}
        (wall, cpu), (side_wall, side_cpu) = taken[base], taken[side]
        found.append(Round(wall, side_wall, cpu, side_cpu))
    return found[warm:]


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """(wall, processor) seconds of one call, all threads of the process counted."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(rounds: list[Round]) -> dict[str, float | list[float]]:
    """Medians over rounds of both sides' seconds and of their ratio, its lowest and highest, and that of processor
    time, which others on the machine disturb less."""
    ratios = [r.side / r.base for r in rounds]
    return {
        "seconds": statistics.median(r.side for r in rounds),
        "base_seconds": statistics.median(r.base for r in rounds),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(r.side_cpu / r.base_cpu for r in rounds),
    }
