"""The twelve scenarios of continual learning for language models, as streams. Importing this reads no data."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.errors import RequestError, unknown
from jaxcl.scenarios import (
    alignment,
    editing,
    instruction,
    intents,
    ner,
    pretraining,
    refinement,
    relations,
    retrieval,
    reviews,
    temporal,
    text_classification,
    tools,
    translation,
)
from jaxcl.scenarios.base import SCENARIOS, Scenario, Settings, StreamInfo

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

_FILES = (
    *(pretraining, temporal),
    *(text_classification, intents, reviews, ner, relations, translation, instruction),
    *(editing, refinement, alignment, retrieval, tools),
)
STREAMS: dict[str, StreamInfo] = {info.name: info for file in _FILES for info in file.STREAMS}
__all__ = ["SCENARIOS", "STREAMS", "Scenario", "Settings", "StreamInfo", "open_stream"]


def open_stream(name: str, tokenizer: Tokenizer, settings: Settings | None = None, **fields: Any) -> Scenario:
    """Reads a stream: its stages, its evals and what may be kept between stages.

    settings, or its fields as keywords. RequestError: an unknown stream, data that is absent (which folder, which
    public source), malformed rows, a leak that is not allowed by name, an option that the stream does not have.
    """
    if name not in STREAMS:
        raise unknown("stream", name, STREAMS)
    info, settings = STREAMS[name], settings or Settings(**fields)
    _check_present(info, settings)
    return info.build(info, _ordered(info, settings), tokenizer, settings)


def _check_present(info: StreamInfo, settings: Settings) -> None:
    """One line where data is absent: which folder, and where the public has it."""
    root = settings.data_dir or os.environ.get("JAXCL_DATA")
    for name in (part for data in info.data for part in data.split(" + ")):
        folder = re.split(r":|/\w+=", name)[0]  # without a split, without filters
        if root and (Path(root) / folder).exists():
            continue
        there = f"no {Path(root) / folder}" if root else "no data directory"
        public = f"; in public it is {', '.join(info.public)}" if info.public else ""
        raise RequestError(
            f"stream {info.name!r}: {there}; --data or JAXCL_DATA must name the folder that holds {folder}/{public}"
        )


def _ordered(info: StreamInfo, settings: Settings) -> tuple[str, ...]:
    if settings.order == "given":
        return info.stages
    from jaxcl.scenarios import orders

    return orders.ordered(info, settings)
