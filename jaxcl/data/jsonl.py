"""JSON Lines files, plain or gzip: read, checked against a schema, refused with file, line and field.

The schemas: ``instruct`` (an instruction, an input and the wanted answer), ``text`` (a document), ``edit`` (a prompt
with its new answer, other wordings of it, and a prompt whose answer must stay), ``ner`` (tokens with BIO tags), ``re``
(tokens, two entities and their relation), ``translation`` (a sentence in three languages), ``tool`` (a dialogue with
calls of tools, or an instruction with its calls), ``retrieval`` (a document, or a query with its documents), ``mcq`` (a
question with choices), ``probe`` (a prompt and what may continue it) and ``preference`` (a prompt with a chosen and a
rejected answer). Fields that a schema does not name are kept as they are.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcl.data.row_checks import CHECKS
from jaxcl.errors import RequestError, clipped, nearest, shown, unknown

MAX_LINE = 4 << 20
"""A longer line is refused before it is parsed: no row of text is that long, a damaged file may be."""
MAX_FILE, MAX_GROWTH = 8 << 20, 200
"""A gzip file may unpack to 8 MiB, a large one to 200 times its size: text shrinks to a tenth, a bomb to 0.1%."""

_STRINGS = "a list of strings"
_ANY_STRINGS = "a list of strings, which may be empty"
_EDIT = ("id", "subject", "prompt", "target", "locality_prompt", "locality_target")
_NAMES = {str: "a string", int: "an integer", float: "a number", list: "a list", dict: "an object"}
REQUIRED: dict[str, dict[str, Any]] = {
    "instruct": {"task": str, "id": str, "instruction": str, "input": str, "target": str},
    "text": {"id": str, "text": str},
    "edit": dict.fromkeys(_EDIT, str),
    "ner": {"task": str, "id": str, "tokens": _STRINGS, "tags": _STRINGS},
    "re": {"task": str, "id": str, "relation": str, "relation_id": int, "tokens": _STRINGS, "head": dict, "tail": dict},
    "translation": dict.fromkeys(("id", "en", "de", "fr"), str),
    "mcq": {"task": str, "id": str, "question": str, "choices": _STRINGS, "answer": int},
    "probe": {"id": str, "relation": str, "prompt": str, "answers": _STRINGS},
    "preference": dict.fromkeys(("id", "prompt", "chosen", "rejected"), str),
    "tool": {"id": str},
    "retrieval": {"id": str},
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "instruct": {"labels": _STRINGS, "targets": _STRINGS, "answer": (str, int, float), "count": int},
    "text": {"domain": str, "lang": str, "date": str},
    "edit": {"target_true": str, "rephrases": _ANY_STRINGS, "loc_train_prompt": str},
    "ner": {},
    "re": {"candidates": _STRINGS},
    "translation": {},
    "mcq": {},
    "probe": {"choices": _STRINGS, "answer": int, "paraphrases": _ANY_STRINGS, "subject": str, "date": str},
    "preference": {"source": str},
    "tool": {"tools": list, "messages": list, "golden_calls": list, "functions": _ANY_STRINGS}
    | dict.fromkeys(("api", "tools_description", "instruction"), str),
    "retrieval": {"title": str, "text": str, "year": str, "query": str, "relevant": _STRINGS, "grades": dict},
}


def read_rows(path: str | Path, schema: str = "instruct") -> list[dict[str, Any]]:
    """All rows of a ``.jsonl`` or ``.jsonl.gz`` file, checked; RequestError: see `iter_rows`, and no rows at all."""
    rows = list(iter_rows(path, schema))
    if not rows:
        raise RequestError(f"{path}: no rows; a stage needs at least one")
    return rows


def iter_rows(path: str | Path, schema: str | None = "instruct") -> Iterator[dict[str, Any]]:
    """The rows one after another, so that a file need not fit into memory. schema None: any JSON objects.

    RequestError, with file and line: malformed JSON or UTF-8, a line above `MAX_LINE` bytes, a missing field,
    a field of the wrong type, an ``id`` that occurs twice, a gzip stream that is cut off or unpacks to more than
    `MAX_FILE` and `MAX_GROWTH` allow; without a line: no such file, an unknown schema.
    """
    path = Path(path)
    if schema is not None and schema not in REQUIRED:
        raise unknown("schema", schema, REQUIRED)
    return _rows(path, schema)


def count_rows(path: str | Path) -> int:
    """How many rows a file has; nothing is parsed."""
    return sum(1 for _ in _lines(Path(path)))


def _rows(path: Path, schema: str | None) -> Iterator[dict[str, Any]]:
    first_seen: dict[str, int] = {}
    for number, line in _lines(path):
        row = _parse(line, schema, f"{path}:{number}")
        if schema is not None:
            before = first_seen.setdefault(row["id"], number)
            if before != number:
                raise RequestError(f"{path}:{number}: id {clipped(row['id'])!r} was already used in line {before}")
        yield row


def check_row(row: Any, schema: str | None, where: str) -> dict[str, Any]:
    """``row`` itself where it fits the schema (None: any object), else RequestError naming ``where`` and the field."""
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected a JSON object, found {_shown(row)}")
    if schema is None:
        return row
    for field, kind in REQUIRED[schema].items():
        if field not in row:
            raise RequestError(f"{where}: field {field!r} is missing; {nearest(field, row)}")
        _check(row[field], kind, field, where)
    for field, kind in OPTIONAL[schema].items():
        if row.get(field) is not None:
            _check(row[field], kind, field, where)
    for field in ("prompt", "target"):  # what is learned, and what it is learned for
        if field in REQUIRED[schema] and not row[field]:
            raise RequestError(f"{where}: field {field!r} is empty; a row needs an answer to learn")
    problem = CHECKS[schema](row) if schema in CHECKS else None
    if problem:
        raise RequestError(f"{where}: {problem}")
    return row


def data_folder(name: str, data_dir: str | Path | None = None) -> Path:
    """Folder ``name`` of the data directory: ``data_dir``, else $JAXCL_DATA. RequestError where absent."""
    root = data_dir if data_dir is not None else os.environ.get("JAXCL_DATA")
    if not root:
        raise RequestError(f"no data directory: --data or JAXCL_DATA must name the folder that holds {name}/")
    for folder in (Path(root), Path(root) / name):
        if not folder.is_dir():
            raise RequestError(
                f"no folder {folder}; --data or JAXCL_DATA must name the one that holds {name}/"
            )
    return Path(root) / name


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    opened = gzip.open if path.suffix == ".gz" else open
    number, size = 0, 0
    try:
        room = max(MAX_FILE, MAX_GROWTH * path.stat().st_size)
        with opened(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, size = number + 1, size + len(line)
                if len(line) > MAX_LINE:
                    raise RequestError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
                if size > room:
                    raise RequestError(f"{path}:{number}: the file unpacks to more than {room} bytes")
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise RequestError(f"no data file {path}{_beside(path)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path}:{number + 1}: the gzip stream is damaged or cut off ({error})") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse(line: bytes, schema: str | None, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: malformed JSON ({error})") from error
    return check_row(row, schema, where)


def _check(value: Any, kind: Any, field: str, where: str) -> None:
    if kind in (_STRINGS, _ANY_STRINGS):
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        good = good and (bool(value) or kind is _ANY_STRINGS)
        wanted = "a list of strings, not empty" if kind is _STRINGS else kind
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        good = isinstance(value, kinds) and not isinstance(value, bool)
        wanted = " or ".join(_NAMES[k] for k in kinds)
    if not good:
        raise RequestError(f"{where}: field {field!r} must be {wanted}, found {_shown(value)}")
    if not _is_text(value):
        raise RequestError(f"{where}: field {field!r} holds half a surrogate pair, which is no text")


def _is_text(value: Any) -> bool:
    """False for a string that UTF-8 cannot hold; JSON can spell such strings, tokenizers refuse them."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:
        return shown(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _beside(path: Path) -> str:
    """What the folder holds instead, for the error of a missing file."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} is absent too"
    names = sorted(p.name for p in path.parent.iterdir())[:8]
    return f"; {path.parent} holds: {', '.join(names) or 'nothing'}"
