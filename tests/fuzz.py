"""Damaged files, and a guard around what reads them: no hang, no memory without end, nothing executed, one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxcl.errors import LONGEST, RequestError

SECONDS = 20  # of the processor, for a file of some kilobytes
FACTOR, FLOOR = 100, 8 << 20  # bytes of memory: so many a byte of the file, and what any reading may take

# what stands for text that json.dumps cannot write
RAW = {
    "@deep": "[" * 20_000 + "]" * 20_000,
    "@deeper": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "@shallow": "[" * 900 + "]" * 900,
    "@long": "9" * 5_000,
    "@large": "9" * 400,
    "@nan": "NaN",
    "@inf": "-Infinity",
    "@1e400": "1e400",
    "@half": r'"\ud800"',
}
ODD: list[Any] = [None, True, False, 0, -1, 1, 3, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**63), 1e308, 1e-320]
ODD += ["", "x", "\0", "a\nb", "x" * 5_000, [], {}, [None], [[]], {"": 0}, ["x"] * 500, list(range(300)), *RAW]


class Forbidden(BaseException):
    """What a reader must not do; no reader catches it."""


_watching = False
_EVENTS = {"exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "os.rename"}
_EVENTS |= {"pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "os.remove", "os.mkdir"}


def _audit(event: str, args: tuple) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in _EVENTS or writes:
        raise Forbidden(f"{event} {args[:2]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(size: int, seconds: float = SECONDS) -> Iterator[None]:
    """The block may raise RequestError with one short line, and nothing else; for a file of ``size`` bytes."""
    global _watching

    def late(*_: Any) -> None:
        raise Forbidden(f"not done after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        _watching = True
        try:
            yield
        except RequestError as e:
            line = str(e)
            assert line and "\n" not in line and len(line) <= LONGEST, line
        finally:
            _watching = False
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tracemalloc.stop()
        signal.signal(signal.SIGPROF, before)
    assert peak <= FLOOR + FACTOR * size, f"{peak} bytes of memory for a file of {size}"


def search(strategy: st.SearchStrategy, check: Callable[[Any], None], examples: int) -> None:
    """Checks so many examples, the same ones every time."""

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with one to four places altered: bits flipped, cut off, lengths replaced, parts doubled or left out."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        end = at + draw(st.integers(1, 64))
        match draw(st.sampled_from(("flip", "cut", "number", "insert", "twice", "drop"))):
            case "flip":
                out[at : at + 1] = bytes([b ^ 1 << draw(st.integers(0, 7)) for b in out[at : at + 1]])
            case "cut":
                del out[at:]
            case "number":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                value = draw(st.sampled_from((0, 1, 2**7, 2**15, 2**31, 2**40, 2**63 - 1, 2**64 - 1)))
                out[at : at + width] = (value % 256**width).to_bytes(width, "little")
            case "insert":
                out[at:at] = draw(st.binary(max_size=32))
            case "twice":
                out[at:at] = out[at:end]
            case "drop":
                del out[at:end]
    return bytes(out)


@st.composite
def odd_json(draw: st.DrawFn, value: Any) -> bytes:
    """The JSON of a value in which one to three things are other ones, gone, or there twice."""
    made = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(made)) or [([made], 0)]))
        odd = json.loads(json.dumps(draw(st.sampled_from(ODD))))
        match draw(st.sampled_from(("replace", "replace", "drop", "add", "twice"))):
            case "replace":
                holder[key] = odd
            case "drop":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[f"{key}@twice" if draw(st.booleans()) else draw(st.text(max_size=5))] = odd
            case "twice" if isinstance(holder, list):
                holder.append(holder[key])
    text = json.dumps(made).replace('@twice":', '":')  # a key twice in one object
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def any_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file with odd values, with odd bytes, or of nothing but bytes."""
    return odd_json(value) | damaged(json.dumps(value).encode()) | st.binary(max_size=64)
