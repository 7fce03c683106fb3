"""Curves as inline SVG: one picture for light, dark and paper, its colours are the page's CSS variables.

A point tells its value when the pointer rests on it (<title>); the picture as a whole has a text for those who do not
see it. Lines differ in colour (Okabe and Ito's eight, told apart by colour-blind readers) and in their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxcl.report.html import Html, tag

COLOURS = 8  # --c0 ... --c7 of the style sheet
DASHES = (None, "6 3", "2 3", "8 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 22, 8, 22  # of the frame, in CSS pixels
_NAMED = 600  # from this width on, vertical lines are named


class Look(NamedTuple):
    """How a run is drawn, everywhere on the page: colour 0..7 and dashes 0..3."""

    colour: int
    dash: int = 0


class Point(NamedTuple):
    """A point and what it says; ``own``: the task's own stage, drawn as a ring."""

    x: float
    y: float
    title: str | None = None
    own: bool = False


class Curve(NamedTuple):
    """A line. band: (x, low, high) behind it. width: of the line, in CSS pixels."""

    points: Sequence[Point]
    look: Look
    band: Sequence[tuple[float, float, float]] = ()
    width: float = 1.8


class Frame(NamedTuple):
    """Where numbers land in the picture: width, height and the spans of both axes."""

    width: int
    height: int
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, v: float) -> float:
        """Pixels from the left."""
        share = (v - self.xs[0]) / (self.xs[1] - self.xs[0])
        return round(_LEFT + share * (self.width - _LEFT - _RIGHT), 1)

    def y(self, v: float) -> float:
        """Pixels from the top."""
        share = (v - self.ys[0]) / (self.ys[1] - self.ys[0])
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)


def chart(
    curves: Sequence[Curve],
    *,
    label: str,
    size: tuple[int, int],
    ticks: Sequence[str] | None = None,
    xs: tuple[float, float] | None = None,
    ys: tuple[float, float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
    breaks: Sequence[tuple[float, str]] = (),
) -> Html:
    """A picture of curves. label: what it says in words. ticks: names of the numbers 0, 1, ... of the x axis, which
    otherwise has numbers of its own. xs, ys: spans of the axes, else those of the points. levels: (y, what it is),
    dotted lines across. breaks: (x, what begins there), lines from top to bottom."""
    ends = [(p.x, p.y) for c in curves for p in c.points]
    bands = [y for c in curves for _, *b in c.band for y in b]
    across = xs or (span([x for x, _ in ends]) if ticks is None else (0.0, max(len(ticks) - 1, 1)))
    up = ys or padded(span([*(y for _, y in ends), *bands, *(y for y, _ in levels)]))
    frame = Frame(*size, across, up)
    parts = [*_grid(frame), *_ticks(frame, ticks)]
    parts += [p for x, name in breaks for p in _break(frame, x, name)]
    parts += [_across(frame, y, tag("title", name), cls="level") for y, name in levels]
    parts += [_curve(frame, c) for c in curves]
    box = f"0 0 {frame.width} {frame.height}"
    return tag("svg", *parts, viewBox=box, width=frame.width, height=frame.height, role="img", aria_label=label)


def _curve(frame: Frame, c: Curve) -> Html:
    parts = []
    if c.band:
        there = [f"{frame.x(x)} {frame.y(high)}" for x, _, high in c.band]
        back = [f"{frame.x(x)} {frame.y(low)}" for x, low, _ in reversed(c.band)]
        parts.append(tag("path", d=f"M{'L'.join(there + back)}Z", cls="band"))
    if len(c.points) > 1:
        d = "M" + "L".join(f"{frame.x(p.x)} {frame.y(p.y)}" for p in c.points)
        parts.append(tag("path", d=d, stroke_width=c.width, stroke_dasharray=DASHES[c.look.dash], cls="line"))
    for p in c.points:
        if p.title is not None:
            where = {"cx": frame.x(p.x), "cy": frame.y(p.y), "r": 4 if p.own else 2.5}
            parts.append(tag("circle", tag("title", p.title), **where, cls="own" if p.own else None))
    return tag("g", *parts, cls=f"c{c.look.colour}")


def _grid(frame: Frame) -> list[Html]:
    """Faint lines at round values, named on the left."""
    out = []
    for v in round_ticks(*frame.ys):
        out.append(_across(frame, v, cls="grid"))
        out.append(tag("text", f"{v:g}", x=_LEFT - 6, y=frame.y(v) + 4, text_anchor="end"))
    return out


def _across(frame: Frame, y: float, *inside: Html, cls: str) -> Html:
    return tag("line", *inside, x1=_LEFT, x2=frame.width - _RIGHT, y1=frame.y(y), y2=frame.y(y), cls=cls)


def _break(frame: Frame, x: float, name: str) -> list[Html]:
    """A line from top to bottom, its name beside it for wide pictures, else on hover."""
    at = frame.x(x)
    line = tag("line", tag("title", name), x1=at, x2=at, y1=_TOP, y2=frame.height - _BOTTOM, cls="break")
    return [line, tag("text", name, x=at + 4, y=_TOP + 8)] if frame.width >= _NAMED else [line]


def _ticks(frame: Frame, names: Sequence[str] | None) -> list[Html]:
    if names is None:
        pairs = [(v, f"{v:,.0f}") for v in round_ticks(*frame.xs) if v == int(v)]
    else:
        room = (frame.width - _LEFT - _RIGHT) / max(len(names), 1)
        fits = 6.5 * max(map(len, names), default=0) < room
        there = [i for i in range(len(names)) if frame.xs[0] <= i <= frame.xs[1]]
        pairs = [(float(i), names[i] if fits else str(i)) for i in there]
    return [tag("text", name, x=frame.x(v), y=frame.height - 6, text_anchor="middle") for v, name in pairs]


def swatch(look: Look) -> Html:
    """A short piece of a line, for the list of names."""
    line = tag("path", d="M1 6H27", stroke_width=2.4, stroke_dasharray=DASHES[look.dash], cls=f"line c{look.colour}")
    return tag("svg", line, viewBox="0 0 28 12", width=28, height=12, aria_hidden="true")


def span(values: Sequence[float]) -> tuple[float, float]:
    """(lowest, highest), a little apart where they are one; (0, 1) of nothing."""
    if not values:
        return 0.0, 1.0
    lo, hi = float(min(values)), float(max(values))
    return (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)


def padded(ends: tuple[float, float], share: float = 0.06) -> tuple[float, float]:
    """The span with some air at both ends."""
    air = share * (ends[1] - ends[0])
    return ends[0] - air, ends[1] + air


def round_ticks(lo: float, hi: float, about: int = 4) -> list[float]:
    """Some four multiples of 1, 2, 2.5 or 5 times a power of ten between lo and hi."""
    rough = (hi - lo) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
