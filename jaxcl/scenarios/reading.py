"""What the builders of streams share: training rows without leaks, a number of rows to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Settings

if TYPE_CHECKING:
    from jaxcl.core.types import Budget

Row = dict[str, Any]
Parts = Mapping[str, Sequence[Row]]
"""{stage: its rows}."""


def cleaned(
    train: Parts,
    test: Parts,
    text: Callable[[Row], str],
    settings: Settings,
    *,
    drop: Sequence[str] = (),
    near: bool = False,
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """(training rows without leaks, notes on what was dropped or allowed); see `data.leaks`.

    drop: kinds of leaks that the public data is known to have; the training rows in question are left out (the later
    stage's of two), unless the kind is allowed. near: near-duplicates are looked for too. RequestError: any other leak
    that ``settings.allow`` does not name.
    """
    from jaxcl.data import leaks

    kept = {stage: list(rows) for stage, rows in train.items()}
    drop = [kind for kind in drop if kind not in settings.allow]
    if "test-in-train" in drop:
        tests = [text(row) for rows in test.values() for row in rows]
        kept = {stage: leaks.unrepeated(rows, tests, text) for stage, rows in kept.items()}
    if "near-duplicates" in drop:
        kept, near = _without_near(kept, test, text), False
    notes: dict[str, Any] = {}
    if gone := {stage: len(train[stage]) - len(rows) for stage, rows in kept.items() if len(rows) < len(train[stage])}:
        notes["dropped from training"] = {"leaks": drop, "rows": gone}
    if near or "test-in-train" not in drop:
        found = leaks.check(_texts(kept, text), _texts(test, text), near=near, allow=settings.allow)
        notes |= {"leaks allowed": found} if found else {}
    return kept, notes


def _without_near(train: Parts, test: Parts, text: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Training rows that are nearly none of a test row, and none of an earlier stage's."""
    from jaxcl.data.leaks import near_duplicates

    own = {(stage, row["id"]) for stage, rows in train.items() for row in rows}
    tested = {(stage, row["id"]) for stage, rows in test.items() for row in rows} - own
    pairs = near_duplicates(_texts(train, text), _texts(test, text))
    drop = {(b, its) if (a, one) in tested else (a, one) for a, one, b, its in pairs}
    return {stage: [row for row in rows if (stage, row["id"]) not in drop] for stage, rows in train.items()}


def _texts(parts: Parts, text: Callable[[Row], str]) -> dict[str, dict[str, str]]:
    return {stage: {row["id"]: text(row) for row in rows} for stage, rows in parts.items()}


def examples(count: int) -> Budget:
    """So many rows of past stages may be held; NOTHING where that is none."""
    from jaxcl.core.types import NOTHING, Budget

    return Budget(examples=count) if count else NOTHING
