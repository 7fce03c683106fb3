"""Pictures of a report: PNG bytes, drawn by matplotlib without a display, for light and for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.metrics.matrix_file import Matrix


class Theme(NamedTuple):
    """Colours of a picture. paper: its background, None where the page supplies one."""

    ink: str
    faint: str
    scale: str
    own: str
    paper: str | None = None


LIGHT = Theme("#1c2126", "#b9c0c8", "YlGnBu", "#d1495b")
DARK = Theme("#e8eaed", "#5b6570", "viridis", "#ff8a80")
ALONE = LIGHT._replace(paper="white")
# told apart by colour-blind readers (Okabe and Ito)
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")


def _png(figure: Any, theme: Theme) -> bytes:
    out = io.BytesIO()
    paper = {"facecolor": theme.paper} if theme.paper else {"transparent": True}
    figure.savefig(out, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None}, **paper)
    return out.getvalue()


def _axes(width: float, height: float, theme: Theme) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=theme.ink, length=0, labelsize=9)
    return figure, axes


def _short(text: str, most: int = 24) -> str:
    """Long names are cut in the middle; a dollar sign is no mathematics here."""
    cut = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
    return cut.replace("$", r"\$")


def row_names(m: Matrix) -> list[str]:
    """Names of the rows of the picture, row 0 first."""
    return ["before training", *(f"after {s.name}" for s in m.stages[: len(m.rows)])]


def matrix_png(m: Matrix, theme: Theme = ALONE) -> bytes:
    """The accuracy matrix with row 0 on top; the cell of each eval's own stage is outlined, an unmeasured
    cell stays empty. The colours span the evals' range where it is bounded, else the values found."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cells = np.vstack([m.row0[None], m.rows])
    height, width = cells.shape
    figure, axes = _axes(1.6 + 0.95 * width, 0.9 + 0.48 * height, theme)
    colours = colormaps[theme.scale]
    shade = _shades(m, cells)
    for t, i in np.ndindex(height, width):
        value = float(cells[t, i])
        if math.isnan(value):
            axes.text(i, t, "–", ha="center", va="center", color=theme.faint, fontsize=10)
            continue
        colour = colours(0.08 + 0.84 * shade[t, i])
        axes.add_patch(Rectangle((i - 0.48, t - 0.46), 0.96, 0.92, color=colour, linewidth=0))
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.55
        ink = "#111111" if bright else "#ffffff"
        axes.text(i, t, _number(value), ha="center", va="center", color=ink, fontsize=10)
    for i, e in enumerate(m.evals):
        own = m.learned(e.id)
        if own is not None and own < len(m.rows):
            box = Rectangle((i - 0.48, own + 0.54), 0.96, 0.92, fill=False, edgecolor=theme.own, linewidth=2)
            axes.add_patch(box)
    axes.axhline(0.5, color=theme.faint, linewidth=1)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.xaxis.tick_top()
    names = [_short(e.id, 20) for e in m.evals]
    crowded = max(map(len, names)) > 11
    turn = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(width), names, **turn)
    axes.set_yticks(range(height), [_short(n, 32) for n in row_names(m)])
    return _png(figure, theme)


def _shades(m: Matrix, cells: np.ndarray) -> np.ndarray:
    """f64[rows, evals] in 0..1, 1 is good: position in the eval's range, or among the values found."""
    out = np.zeros_like(cells)
    for i, e in enumerate(m.evals):
        column = cells[:, i]
        if np.isnan(column).all():
            continue
        lo, hi = (b if math.isfinite(b) else f(column) for b, f in zip(e.range, (np.nanmin, np.nanmax)))
        out[:, i] = (column - lo) / (hi - lo) if hi > lo else 0.5
        out[:, i] = out[:, i] if e.higher_is_better else 1 - out[:, i]
    return np.clip(out, 0, 1)


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def lines_png(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    theme: Theme = ALONE,
    ticks: Sequence[str] | None = None,
) -> bytes:
    """Curves {name: (x, y) points} in one frame; ``ticks`` names the numbers 0, 1, ... of the x axis."""
    figure, axes = _axes(7.2, 3.0, theme)
    for k, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*points) if points else ((), ())
        marker = "o" if ticks is not None else None
        colour = _LINES[k % len(_LINES)]
        style = ("-", "--", ":")[k // len(_LINES) % 3]
        axes.plot(
            xs, ys, style, marker=marker, markersize=4, linewidth=1.6, color=colour, label=_short(name, 30)
        )
    axes.grid(axis="y", color=theme.faint, linewidth=0.5, alpha=0.6)
    axes.set_xlabel(x, color=theme.ink, fontsize=9)
    axes.set_ylabel(y, color=theme.ink, fontsize=9)
    if ticks is not None:
        axes.set_xticks(
            range(len(ticks)), [_short(t, 16) for t in ticks], rotation=20 if len(ticks) > 6 else 0
        )
    if len(curves) > 1:
        axes.legend(
            frameon=False, labelcolor=theme.ink, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return _png(figure, theme)


def smoothed(points: Sequence[tuple[int, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most ``most`` points: means over equal stretches of a long curve."""
    if len(points) <= most:
        return [(float(s), v) for s, v in points]
    parts = np.array_split(np.asarray(points, np.float64), most)
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]
