"""How jaxcl fails: one line that names the value, the place and what would be accepted.

Exit status: 1 the run failed, 2 the request cannot be served, 75 interrupted with its state saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxclError(Exception):
    """Base of all errors that reach a user as one line. ``exit_code`` is the process's exit status."""

    exit_code = 1


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


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """``"did you mean 'olora'?"`` where something is close, else the accepted names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"accepted: {shown or 'none'}"


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "") -> RequestError:
    """The error for a name that is not among ``known``; ``where`` says where the name was found."""
    place = f" in {where}" if where else ""
    return RequestError(f"unknown {kind} {name!r}{place}; {nearest(name, known)}")


def needs_extra(package: str, extra: str) -> RequestError:
    """The error for an optional package that is absent."""
    return RequestError(f"this needs the package {package!r}; install it with: pip install 'jaxcl[{extra}]'")
