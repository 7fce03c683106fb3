"""HTML without templates: nested calls, everything escaped that is not already HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""


def esc(value: Any) -> Html:
    """Any value as HTML text; `Html` passes through."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(_name: str, *inside: Any, **attributes: Any) -> Html:
    """<name attributes>inside</name>; ``cls`` is class, attributes that are None are left out."""
    opening = ""
    for key, value in attributes.items():
        if value is not None:
            name = "class" if key == "cls" else key.replace("_", "-")
            opening += f' {name}="{html.escape(str(value))}"'
    if _name in ("img", "source", "meta"):
        return Html(f"<{_name}{opening}>")
    return Html(f"<{_name}{opening}>{''.join(map(esc, inside))}</{_name}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str | None = None) -> Html:
    """A table whose first column names its row; numbers (in `num`) align right."""
    top = tag("tr", *(tag("th", h, scope="col") for h in head))
    body = [tag("tr", tag("th", r[0], scope="row"), *(tag("td", c) for c in r[1:])) for r in rows]
    parts = [tag("caption", caption)] if caption else []
    return tag("div", tag("table", *parts, tag("thead", top), tag("tbody", *body)), cls="wide")


def picture(light: bytes, dark: bytes, alt: str) -> Html:
    """An embedded picture that follows the reader's colour scheme."""

    def data(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode()

    width = round(int.from_bytes(light[16:20], "big") * 96 / 150)  # drawn at 150 dpi, a page has 96
    other = tag("source", srcset=data(dark), media="(prefers-color-scheme: dark) and (not print)")
    return tag("picture", other, tag("img", src=data(light), alt=alt, width=width))


def details(summary: str, *inside: Any) -> Html:
    """A part that opens on request."""
    return tag("details", tag("summary", summary), *inside)


def page(title: str, style: str, *inside: Any) -> str:
    """A whole document without scripts; its policy forbids loading anything from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    body = tag("body", tag("main", *inside))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"
