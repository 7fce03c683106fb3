"""HTML without templates: nested calls, everything escaped that is not already HTML."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

_EMPTY = ("meta", "line", "circle", "path", "rect")


class Html(str):
    """Text that is HTML already."""


DASH = Html("&ndash;")


def esc(value: Any) -> Html:
    """Any value as HTML text; `Html` passes through."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(_name: str, *inside: Any, **attributes: Any) -> Html:
    """<name attributes>inside</name>; ``cls`` is class, attributes that are None are left out, those that are True
    have no value."""
    opening = ""
    for key, value in attributes.items():
        if value is not None:
            name = "class" if key == "cls" else key.replace("_", "-")
            opening += f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
    if _name in _EMPTY and not inside:
        return Html(f"<{_name}{opening}>" if _name == "meta" else f"<{_name}{opening}/>")
    return Html(f"<{_name}{opening}>{''.join(map(esc, inside))}</{_name}>")


def cell(value: float | None, shown: Any = None, why: str = "not measured") -> Html:
    """A <td> that sorts by its exact value and shows ``shown``; a dash that tells why where there is no value."""
    if value is None or math.isnan(value):
        return tag("td", DASH, title=why, data_v="")
    return tag("td", number(value) if shown is None else shown, data_v=repr(float(value)), cls="n")


def number(value: float) -> str:
    """Four decimals below 10, two below 1000, else whole with thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, sortable: bool = False, cls: str = "") -> Html:
    """A table whose first column names its row. Cells may be <td> (see `cell`) or anything. The page's script lets the
    reader sort those that are ``sortable``."""
    top = tag("tr", *(tag("th", h, scope="col") for h in head))
    body = [tag("tr", tag("th", r[0], scope="row"), *map(_td, r[1:])) for r in rows]
    names = " ".join(filter(None, (cls, "sortable" if sortable else "")))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body), cls=names or None), cls="wide")


def _td(inside: Any) -> Html:
    return inside if isinstance(inside, Html) and inside.startswith("<td") else tag("td", inside)


def details(summary: str, *inside: Any) -> Html:
    """A part that opens on request."""
    return tag("details", tag("summary", summary), *inside)


def section(title: str, *inside: Any, anchor: str) -> Html:
    """A part of the page that its list of contents can lead to."""
    return tag("section", tag("h2", title), *inside, id=anchor)


def note(text: Any) -> Html:
    """A line of explanation."""
    return tag("p", text, cls="note")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, style: str, script: str, *inside: Any) -> str:
    """A whole document. Its policy runs this script, applies this style, and loads nothing from anywhere."""
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    body = tag("body", tag("main", *inside), tag("script", Html(script)))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"
