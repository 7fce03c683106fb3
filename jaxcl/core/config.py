"""An experiment's Config: a frozen dataclass of plain values, and overrides ``a.b=c`` checked against its types."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.errors import RequestError, unknown


def override(config: Any, settings: Sequence[str]) -> Any:
    """The config with ``key.sub=value`` applied in order. RequestError for unknown keys and wrong types."""
    for text in settings:
        if text.encode("utf-8", "replace").decode() != text:
            raise RequestError(f"--set {text!r}: not UTF-8")
        path, sign, value = text.partition("=")
        if not sign:
            raise RequestError(f"--set {text!r}: expected KEY=VALUE, for example --set seed=1")
        config = _set(config, path.strip().split("."), value, text)
    return config


def _set(config: Any, path: list[str], value: str, text: str) -> Any:
    hints = typing.get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        raise unknown("key", path[0], names, where=f"--set {text}")
    if len(path) > 1:
        inner = getattr(config, path[0])
        if not dataclasses.is_dataclass(inner):
            raise RequestError(f"--set {text}: {path[0]!r} is a plain value, it has no {path[1]!r}")
        new = _set(inner, path[1:], value, text)
    else:
        new = parse(value, hints[path[0]], f"--set {text}")
    try:
        return dataclasses.replace(config, **{path[0]: new})
    except ValueError as e:
        raise RequestError(f"--set {text}: {e}") from e


def parse(text: str, kind: Any, where: str) -> Any:
    """``text`` as a value of an annotated type. RequestError, naming ``where``, when it is none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return parse(text, option, where)
            except RequestError:
                continue
        raise RequestError(f"{where}: {text!r} is none of {_name(kind)}")
    if origin is typing.Literal:
        if text not in [str(a) for a in args]:
            raise RequestError(f"{where}: {text!r} is none of {', '.join(map(str, args))}")
        return next(a for a in args if str(a) == text)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise RequestError(f"{where}: {text!r} is no bool; accepted: true, false")
        return text.lower() in ("true", "1")
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise RequestError(f"{where}: {text!r} is no {kind.__name__}") from None
        if not abs(value) < math.inf:
            raise RequestError(f"{where}: {text!r} is not finite; config.json holds numbers that JSON has")
        return value
    if kind is str:
        return text
    if origin in (tuple, list, dict) or kind in (tuple, list, dict):
        return _parse_json(text, kind, origin or kind, args, where)
    raise RequestError(f"{where}: values of type {_name(kind)} cannot be set from the command line")


def _parse_json(text: str, kind: Any, container: Any, args: tuple, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text.split(",") if container is not dict else None
    if container is dict:
        if not isinstance(value, dict):
            raise RequestError(f'{where}: {text!r} is no {_name(kind)}; write JSON such as {{"data": 4}}')
        inner = args[1] if len(args) == 2 else str
        return {k: parse(_text(v), inner, where) for k, v in value.items()}
    items = value if isinstance(value, list) else [value]
    inner = args[0] if args else str
    return container(parse(_text(v), inner, where) for v in items)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def as_json(config: Any) -> dict[str, Any]:
    """The config as JSON values, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def short_hash(value: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that name a config."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
