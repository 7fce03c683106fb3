"""What a scenario lets a method hold of past stages, as a number of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Settings

if TYPE_CHECKING:
    from jaxcl.core.types import Budget
    from jaxcl.data.stage import Stage


def share_of(stages: Sequence[Stage], settings: Settings, default: float) -> Budget:
    """A budget of examples: the option ``keep`` (a share, 0 to 1) of all training rows of the stream. 0: nothing.
    RequestError: another value."""
    from jaxcl.core.types import NOTHING, Budget

    share = settings.option("keep", default)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise RequestError(f"option keep is {share!r}; accepted: the share of all rows that may be held, 0 to 1")
    rows = math.ceil(share * sum(len(stage.train) for stage in stages))
    return Budget(examples=rows) if rows else NOTHING


def whole(settings: Settings, name: str, default: int, least: int = 1) -> int:
    """An option that is a whole number of at least ``least``. RequestError: another value."""
    value = settings.option(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"option {name} is {value!r}; accepted: a whole number of at least {least}")
    return value
