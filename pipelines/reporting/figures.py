"""Figures for reports: each is drawn once with matplotlib, as SVG in the page's colours and as PNG on white.

In the SVG every colour of the palette becomes a CSS variable, so the same SVG suits a light and a dark page; text remains text. The
series' colours are distinguishable with the common kinds of colour blindness and have a contrast of 3 or more to their page; every
series also has its own line style (tests/test_figures.py).
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import write_atomically

# CSS variable → (on a light page, on a dark page). Matplotlib draws with the light values.
PALETTE = {
    "ink": ("#1a1f26", "#e6e9ee"),
    "grid": ("#cfd6de", "#3a424d"),
    "s0": ("#0f62ae", "#62b0f2"),
    "s1": ("#c1500a", "#f59b52"),
    "s2": ("#0e8060", "#4fd1a5"),
    "s3": ("#a03a7d", "#f0a5d6"),
    "s4": ("#33363d", "#e2e6ec"),
}
PAGES = ("#ffffff", "#15181d")  # background, light and dark
SERIES = [name for name in PALETTE if name.startswith("s")]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
SIZE = (4.8, 3.1)  # inches; as wide as a phone, so that text is readable on one
TITLE_CHARACTERS = 56  # of a line of a title, at its size and the figures' width
Values = Sequence[float] | NDArray[Any]


@dataclass(frozen=True)
class Figure:
    """One figure."""

    name: str  # file name of its PNG, without extension
    title: str
    svg: str
    png: bytes

    def write_png(self, folder: Path) -> Path:
        """Write NAME.png into a folder and return its path."""
        path = folder / f"{self.name}.png"
        write_atomically(path, self.png)
        return path


def color(series: int) -> str:
    """Return the colour of the n-th series for matplotlib; colours repeat, with other line styles."""
    return PALETTE[SERIES[series % len(SERIES)]][0]


def style(series: int) -> Any:
    """Return the line style of the n-th series."""
    return LINES[(series + series // len(SERIES)) % len(LINES)]


@contextmanager
def matplotlib_ready(what: str) -> Iterator[Any]:
    """Import pyplot without a display, and set the common style. Raises ConfigError naming `what` if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(f"{what} draws with matplotlib: pip install 'switchkd[viz]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    ink, grid = PALETTE["ink"][0], PALETTE["grid"][0]
    looks: dict[str, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a run's name may contain $, which is not math
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(looks):
        yield pyplot


def lines(
    name: str,
    title: str,
    curves: Mapping[str, tuple[Values, Values]],
    xlabel: str,
    ylabel: str,
    series: Mapping[str, int],
) -> Figure:
    """Draw curves, label → (x, y), from 0 upwards; `series` maps labels to colours and line styles."""
    with matplotlib_ready("report") as pyplot:
        figure, axes = pyplot.subplots(figsize=SIZE)
        for label, (x, y) in curves.items():
            marker = "o" if len(x) == 1 else None
            number = series[label]
            axes.plot(x, y, color=color(number), linestyle=style(number), marker=marker, label=label)
        axes.set(title=_wrapped(title), xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.legend()
        return finish(figure, name, title)


def histogram(
    name: str, title: str, groups: Mapping[str, Values], xlabel: str, series: Mapping[str, int], bins: int = 50
) -> Figure:
    """Draw the distributions of groups over common bins, as shares of each group; `series` as in `lines`."""
    with matplotlib_ready("report") as pyplot:
        figure, axes = pyplot.subplots(figsize=SIZE)
        edges = _edges(np.concatenate([np.asarray(values, dtype=float) for values in groups.values()]), bins)
        for label, values in groups.items():
            number = series[label]
            shares = np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(shares, edges, fill=True, color=color(number), alpha=0.25)
            axes.stairs(shares, edges, color=color(number), linestyle=style(number), linewidth=1.6, label=label)
        axes.set(title=_wrapped(title), xlabel=xlabel, ylabel="share of the positions")
        axes.legend()
        return finish(figure, name, title)


def _wrapped(title: str) -> str:
    """Break a title into lines that fit a figure's width; it may hold the name of a run."""
    return "\n".join(textwrap.wrap(title, TITLE_CHARACTERS)) or title


def _edges(values: NDArray[Any], bins: int) -> NDArray[Any]:
    """Return bin edges; integers over a short range get one bin each."""
    low, high = values.min(), values.max()
    if high - low < bins and not np.any(values % 1):
        return np.arange(low - 0.5, high + 1)
    return np.histogram_bin_edges(values, bins)


def bars(name: str, title: str, x: Values, y: Values, xlabel: str, ylabel: str) -> Figure:
    """Draw one bar for every x."""
    with matplotlib_ready("report") as pyplot:
        figure, axes = pyplot.subplots(figsize=SIZE)
        axes.bar(x, y, color=color(0))
        axes.set(title=_wrapped(title), xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
        return finish(figure, name, title)


def radar(
    name: str, title: str, spokes: Sequence[str], runs: Mapping[str, Values], series: Mapping[str, int]
) -> Figure:
    """Draw a radar chart: runs as polygons, values 0 … 100; the centre is a multiple of ten at least 5 below the least value."""
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    everything = np.concatenate([np.asarray(values, dtype=float) for values in runs.values()])
    low = max(0.0, np.floor((everything.min() - 5) / 10) * 10)
    high = min(100.0, np.ceil((everything.max() + 1) / 10) * 10)
    with matplotlib_ready("report") as pyplot:
        figure, axes = pyplot.subplots(figsize=(SIZE[0], 4.4), subplot_kw={"projection": "polar"})
        axes.set_theta_offset(np.pi / 2)
        axes.set_theta_direction(-1)
        for label, values in runs.items():
            number = series[label]
            closed = np.append(values, values[0])
            around = np.append(angles, angles[0])
            axes.plot(around, closed, color=color(number), linestyle=style(number), marker="o", ms=3, label=label)
            axes.fill(around, closed, color=color(number), alpha=0.08)
        axes.set_ylim(low, high)
        axes.set_xticks(angles, spokes)
        axes.tick_params(axis="x", pad=6)
        for word, side in zip(
            axes.get_xticklabels(), np.sin(angles), strict=True
        ):  # the spokes run clockwise from the top
            word.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axes.tick_params(axis="y", labelsize=7)
        axes.set_rlabel_position(180 / len(spokes))
        axes.spines["polar"].set_color(PALETTE["grid"][0])
        axes.set_title(_wrapped(title), pad=16)
        figure.legend(loc="outside lower center", ncols=2)
        return finish(figure, name, title)


def finish(figure: Any, name: str, title: str) -> Figure:
    """Turn a matplotlib figure into a `Figure`, and close it."""
    from matplotlib import pyplot, rcParams

    rcParams["svg.hashsalt"] = name  # the same data give the same file
    drawn, picture = io.StringIO(), io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.savefig(picture, format="png", dpi=160, facecolor=PAGES[0], metadata={"Software": None})
    pyplot.close(figure)
    return Figure(name, title, themed(drawn.getvalue(), name, title), picture.getvalue())


def themed(svg: str, prefix: str, title: str) -> str:
    """Prepare matplotlib's SVG for embedding in a page: CSS variables for colours, unique ids, the width of its container."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, (light, _) in PALETTE.items():
        svg = re.sub(light, f"var(--{name})", svg, flags=re.IGNORECASE)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="[^"]+"', head[0])
    assert box is not None
    xmlns = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {box[0]} {xmlns} role="img" aria-label="{escape(title)}">' + svg[head.end() :]
