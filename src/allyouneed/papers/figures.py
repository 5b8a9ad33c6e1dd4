"""One house style for every figure: colours that colour-blind readers tell apart, direct labels, the same bytes again.

Figures are built without pyplot, so nothing global changes and nothing needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from allyouneed.core.files import replacing

# Okabe and Ito (2008), "Color Universal Design", without its yellow, which is too faint for lines
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#6B6B6B"  # for a control arm, a baseline, a chance level

_INK = "#222222"
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so text is as wide on every machine
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "allyouneed",  # else the identifiers inside are random
    "svg.fonttype": "path",
}


class _Short(ScalarFormatter):
    """Numbers from ten thousand on in thousands or millions, so that neighbours do not touch."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        most = max(map(abs, self.axis.get_view_interval())) if self.axis is not None else 0.0
        scale, unit = (1e6, " M") if most >= 1e6 else (1e3, " k") if most >= 1e4 else (1.0, "")
        return f"{x / scale:g}{unit}" if unit and x else super().__call__(x, pos)


FEW = 100  # cells of a grid that have room for their numbers


def new(width: float = 7.0, height: float = 4.0, *, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, with `columns` axes side by side in each of its `rows`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.xaxis.set_major_formatter(_Short())
    return figure, every


def describe(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels."""
    axes.set_title(title, loc="left", pad=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def band(axes: Axes, x: Sequence[float], ys: Any, label: str, color: str | None = None, *, style: str = "-") -> None:
    """The mean of `ys`, (seeds, n), over `x`, (n,), with a band from the lowest to the highest seed."""
    lines = np.asarray(ys, dtype=float)
    assert lines.ndim == 2 and lines.shape[1] == len(x), f"ys {lines.shape} is not (seeds, {len(x)})"
    (line,) = axes.plot(x, lines.mean(0), style, color=color, label=label)
    axes.fill_between(x, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.18, linewidth=0)


def bars(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None = None,
    colors: Sequence[str] | None = None,
    *,
    form: str = "{:.3g}",
) -> None:
    """Horizontal bars, first label on top, each with its interval and its value written beside it."""
    places = np.arange(len(labels))[::-1]
    axes.barh(places, values, height=0.62, color=list(colors or PALETTE[: len(labels)]))
    for place, value, (low, high) in zip(places, values, intervals or [(v, v) for v in values], strict=True):
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.4, solid_capstyle="butt")
        end = max(value, high, 0.0)  # on the right of negative ones, too: their left is the labels'
        axes.annotate(
            form.format(value), (end, place), color=_INK, xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=5)  # more ran into each other where they have four digits


def grid(axes: Axes, values: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares of one, (rows, columns), as shades, the first row on top; where they are few also as numbers."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(rows) * len(columns) <= FEW:
        for i, j in np.ndindex(len(rows), len(columns)):
            color = "white" if values[i][j] > 0.5 else "black"
            axes.text(j, i, f"{values[i][j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=60)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)


def mark(axes: Axes, label: str, *, x: float | None = None, y: float | None = None) -> None:
    """A thin dashed line at `x` or `y`, with its meaning written on it: a training length, a chance level, a bound."""
    along = axes.axhline if y is not None else axes.axvline
    along(y if y is not None else x, color=CONTROL, linewidth=1, linestyle=(0, (4, 3)))  # type: ignore[arg-type]
    place: dict[str, Any] = {"color": CONTROL, "fontsize": 9, "textcoords": "offset points"}
    if y is not None:
        axes.annotate(label, (0, y), xycoords=axes.get_yaxis_transform(), xytext=(4, 3), va="bottom", **place)
    else:
        axes.annotate(label, (x or 0, 1), xycoords=axes.get_xaxis_transform(), xytext=(4, -3), va="top", **place)


def label_ends(axes: Axes) -> None:
    """Write every line's label at its right end, in its colour, pushed apart where they would overlap.

    Call it last, when limits and scales stand.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    ends = [np.asarray(line.get_xydata())[-1] for line in lines]
    heights = [axes.transData.transform(end)[1] * 72 / figure.dpi for end in ends]  # in points
    for line, end, height, place in zip(lines, ends, heights, _spread(heights, gap=13.0), strict=True):
        axes.annotate(
            str(line.get_label()),
            end,
            xytext=(8, place - height),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.svg` and `stem.png`; the same figure gives the same bytes."""
    written = []
    for suffix, options in ((".svg", {"metadata": {"Date": None, "Creator": None}}), (".png", {"dpi": 160})):
        path = stem.with_name(stem.name + suffix)
        with replacing(path) as temporary, matplotlib.rc_context(_STYLE):
            figure.savefig(temporary, format=suffix[1:], **options)
        written.append(path)
    return written


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of `heights` and as near to them as groups that touch allow.

    >>> _spread([0.0, 1.0, 50.0], gap=10.0)
    [-4.5, 5.5, 50.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _first(groups[-1], heights, gap) - _last(groups[-2], heights, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    places = {i: _first(group, heights, gap) + gap * k for group in groups for k, i in enumerate(group)}
    return [places[i] for i in range(len(heights))]


def _first(group: list[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def _last(group: list[int], heights: Sequence[float], gap: float) -> float:
    return _first(group, heights, gap) + gap * (len(group) - 1)
