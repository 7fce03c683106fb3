"""Pictures of a report as files: PNG and SVG by matplotlib, without a display, on white paper."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.metrics.matrix_file import Matrix
from jaxcl.report.heat import Scales, cells, row_names, shades, short
from jaxcl.report.svg import Look

_INK, _FAINT, _OWN = "#1c2126", "#b9c0c8", "#d1495b"
# the light colours of style.css: Okabe and Ito, told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#7b5ea7", "#3a9bd9", "#6b6b6b")
_DASHES = ("-", "--", ":", "-.")
FORMATS = ("png", "svg")


def matrix_figure(m: Matrix, among: Scales) -> dict[str, bytes]:
    """{format: file} of the whole matrix with row 0 on top, coloured as on the page; the cell of each eval's own stage
    is outlined, an unmeasured cell stays empty."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    values = cells(m)
    height, width = values.shape
    figure, axes = _axes(1.6 + 0.95 * width, 0.9 + 0.48 * height)
    painted = colormaps["Blues"](0.04 + 0.86 * np.nan_to_num(shades(m, among)))
    painted[np.isnan(values)] = 1.0
    edges = [np.arange(n + 1) - 0.5 for n in (width, height)]
    axes.pcolormesh(*edges, painted, edgecolors="white", linewidth=2.5)
    for t, i in np.ndindex(height, width):
        bright = painted[t, i, :3] @ (0.299, 0.587, 0.114) > 0.55
        shown, ink = (short(float(values[t, i])), "#111111" if bright else "white")
        shown, ink = ("–", _FAINT) if np.isnan(values[t, i]) else (shown, ink)
        axes.text(i, t, shown, ha="center", va="center", color=ink, fontsize=10).set_in_layout(False)
    for i, e in enumerate(m.evals):
        own = m.learned(e.id)
        if own is not None and own < len(m.rows):
            box = Rectangle((i - 0.48, own + 0.54), 0.96, 0.92, fill=False, edgecolor=_OWN, linewidth=2)
            axes.add_patch(box).set_in_layout(False)
    axes.axhline(0.5, color=_FAINT, linewidth=1)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.xaxis.tick_top()
    names = [_plain(e.id, 20) for e in m.evals]
    crowded = max(map(len, names)) > 11
    turn = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(width), names, **turn)
    axes.set_yticks(range(height), [_plain(n, 32) for n in row_names(m)])
    return _files(figure)


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Look]], *, ticks: Sequence[str], x: str, y: str
) -> dict[str, bytes]:
    """{format: file} of curves {name: (values at 0, 1, ..., look)} over named places."""
    figure, axes = _axes(7.2, 3.0)
    for name, (values, look) in curves.items():
        axes.plot(
            range(len(values)), values, _DASHES[look.dash], marker="o", markersize=4, linewidth=1.6,
            color=COLOURS[look.colour], label=_plain(name, 40),
        )  # fmt: skip
    axes.grid(axis="y", color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.set_xticks(range(len(ticks)), [_plain(t, 16) for t in ticks], rotation=20 if len(ticks) > 6 else 0)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return _files(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    return figure, axes


def _files(figure: Any) -> dict[str, bytes]:
    """The same bytes from the same numbers: no dates, no random ids; letters of the SVG stay text."""
    from matplotlib import rc_context

    tight = figure.get_tightbbox(figure.canvas.get_renderer()).padded(0.1)  # found once, not by a drawing a format
    out, nothing = {}, {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxcl"}):
        for kind in FORMATS:
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=150, bbox_inches=tight, metadata=nothing[kind], facecolor="white")
            out[kind] = file.getvalue()
    return out


def _plain(text: str, most: int) -> str:
    """Long names are cut in the middle; a dollar sign is no mathematics here."""
    cut = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
    return cut.replace("$", r"\$")
