"""What a method says that needs a decoder, before the first step."""

from __future__ import annotations

from typing import Any

from jaxcl.errors import RequestError


def decoder_only(spec: Any, name: str, why: str) -> None:
    """RequestError for a model with an encoder: ``why`` is what such a model does or lacks."""
    if getattr(spec, "encodes", False):
        raise RequestError(f"{name}: a model with an encoder {why}; accepted: a decoder")
