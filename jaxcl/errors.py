"""How jaxcl fails: one line that names the value, the place and what would be accepted.

Exit status: 1 the run failed, 2 the request cannot be served, 75 interrupted with its state saved.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 2000
"""Characters of an error's line. What is longer, because it quotes a file, loses its middle."""
_MOST_NAMES, _LONGEST_NAME = 10_000, 120  # of those that are compared: comparing takes the product of the lengths


class JaxclError(Exception):
    """Base of all errors that reach a user as one line. ``exit_code`` is the process's exit status."""

    exit_code = 1

    def __init__(self, message: str = ""):
        line = " ".join(message.splitlines()) if not message.isprintable() else message
        super().__init__(clipped(line, LONGEST))


class RunFailed(JaxclError):
    """The run itself went wrong (NaN in the loss, disk full). Exit status 1."""

    exit_code = 1


class RequestError(JaxclError):
    """The request cannot be served: unknown name, bad value, missing or malformed file. Exit status 2."""

    exit_code = 2


class KeyTaken(RequestError):
    """A method wants to make the parameter ``key``, which another one has made. Exit status 2."""

    def __init__(self, message: str, key: str):
        super().__init__(message)
        self.key = key


class Interrupted(JaxclError):
    """Stopped by a signal; everything is saved and the same command continues. Exit status 75."""

    exit_code = 75


def clipped(text: str, most: int = _LONGEST_NAME) -> str:
    """The text, its middle left out where it has more than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 3]} ... {text[3 - most // 2 :]}"


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = _LONGEST_NAME
_brief.maxlist = _brief.maxdict = _brief.maxtuple = 12


def shown(value: Any) -> str:
    """A value out of a file as an error quotes it: as Python writes it, short however large or deeply nested it is."""
    return clipped(_brief.repr(value))


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """``"did you mean 'olora'?"`` where something is close, else the accepted names."""
    known = sorted(known)
    near = [k for k in known[:_MOST_NAMES] if len(k) <= _LONGEST_NAME]
    close = difflib.get_close_matches(name, near, n=most, cutoff=0.6) if len(name) <= _LONGEST_NAME else []
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    names = ", ".join(clipped(k) for k in known[:12]) + (", ..." if len(known) > 12 else "")
    return f"accepted: {names or 'none'}"


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "") -> RequestError:
    """The error for a name that is not among ``known``; ``where`` says where the name was found."""
    place = f" in {where}" if where else ""
    return RequestError(f"unknown {kind} {clipped(name)!r}{place}; {nearest(name, known)}")


def needs_extra(package: str, extra: str) -> RequestError:
    """The error for an optional package that is absent."""
    return RequestError(f"this needs the package {package!r}; install it with: pip install 'jaxcl[{extra}]'")
