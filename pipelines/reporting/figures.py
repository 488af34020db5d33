"""Figures for reports: each is drawn once with matplotlib, as SVG in the page's colours and as PNG on white.

In the SVG every colour of the palette becomes a CSS variable, so the same SVG suits a light and a dark page; text remains text.
A legend stands below the axes, and a figure grows with its title and its legend, so neither covers the data. Colours, line styles
and the limits of axes: `pipelines/drawing.py`.
"""

import io
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.pipelines.drawing import (
    PAGES,
    PALETTE,
    SERIES,
    TEACHER,
    color,
    matplotlib_ready,
    show_differences,
    style,
    whole_numbers,
    wrapped,
)
from switchkd.pipelines.run_folder import write_atomically

SIZE = (4.8, 3.1)  # inches, with a title of one line and no legend; as wide as a phone, so that text is readable on one
TITLE_CHARACTERS = 56  # of a line of a title, at its size and the figures' width
LINE = 0.17  # inches, height of a line of a title or a legend
LEGEND_SIZE = 8  # points
LEGEND_COLUMNS = 3  # at most
HANDLE = 34.0  # points, of a legend's line and the space around it
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


@dataclass(frozen=True)
class Interval:
    """A value with its interval, low ≤ high."""

    value: float
    low: float
    high: float


def lines(
    name: str,
    title: str,
    curves: Mapping[str, tuple[Values, Values]],
    xlabel: str,
    ylabel: str,
    series: Mapping[str, int],
) -> list[Figure]:
    """Draw curves, label → (x, y); `series` maps labels to colours and line styles.

    More curves than there are colours are drawn in several figures with the same y axis.
    """
    found = []
    everything = [value for _, y in curves.values() for value in y]
    for part, subtitle, labels in _parts(name, title, curves, series):
        with matplotlib_ready("report") as pyplot, _axes(pyplot, part, subtitle, labels) as (axes, finished):
            for label in labels:
                x, y = curves[label]
                marker = "o" if len(x) == 1 else None
                number = series[label]
                axes.plot(x, y, color=color(number), linestyle=style(number), marker=marker, label=_legend_text(label))
            axes.set(xlabel=xlabel, ylabel=ylabel)
            whole_numbers(axes.xaxis)
            show_differences(axes, everything)
        found += finished
    return found


def histogram(
    name: str, title: str, groups: Mapping[str, Values], xlabel: str, series: Mapping[str, int], bins: int = 50
) -> Figure:
    """Draw the distributions of groups over common bins, as shares of each group; `series` as in `lines`."""
    with matplotlib_ready("report") as pyplot, _axes(pyplot, name, title, list(groups)) as (axes, finished):
        edges = bin_edges(np.concatenate([np.asarray(values, dtype=float) for values in groups.values()]), bins)
        for label, values in groups.items():
            number = series[label]
            shares = np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(shares, edges, fill=True, color=color(number), alpha=0.25)
            line = {"color": color(number), "linestyle": style(number), "linewidth": 1.6}
            axes.stairs(shares, edges, label=_legend_text(label), **line)
        axes.set(xlabel=xlabel, ylabel="share of the positions")
    return finished[0]


def bin_edges(values: NDArray[Any], bins: int) -> NDArray[Any]:
    """Return bin edges; integers over a short range get one bin each."""
    low, high = values.min(), values.max()
    if high - low < bins and not np.any(values % 1):
        return np.arange(low - 0.5, high + 1)
    return np.histogram_bin_edges(values, bins)


def bars(name: str, title: str, x: Values, y: Values, xlabel: str, ylabel: str) -> Figure:
    """Draw one bar for every x, from 0 upwards: the length of a bar is its value."""
    with matplotlib_ready("report") as pyplot, _axes(pyplot, name, title) as (axes, finished):
        axes.bar(x, y, color=color(0))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        whole_numbers(axes.xaxis)
        axes.grid(axis="x", visible=False)
    return finished[0]


def intervals(
    name: str,
    title: str,
    rows: Mapping[str, Mapping[str, Interval]],
    xlabel: str,
    series: Mapping[str, int],
) -> list[Figure]:
    """Draw values with their intervals beside a line at 0: a row per key of `rows`, in it a dot per label.

    More labels than there are colours are drawn in several figures with the same x axis.
    """
    found = []
    every = dict.fromkeys(label for row in rows.values() for label in row)
    ends = [end for row in rows.values() for one in row.values() for end in (one.low, one.high, one.value)]
    names = [textwrap.fill(row, 24) for row in rows]
    for part, subtitle, labels in _parts(name, title, every, series):
        height = max(SIZE[1], 1.0 + len(rows) * (0.16 * len(labels) + 0.22))
        with matplotlib_ready("report") as pyplot, _axes(pyplot, part, subtitle, labels, height) as (axes, finished):
            for place, label in enumerate(labels):
                at = [(number, row[label]) for number, row in enumerate(rows.values()) if label in row]
                y = [number + (place - (len(labels) - 1) / 2) * 0.7 / len(labels) for number, _ in at]
                values = [one.value for _, one in at]
                sides = [[one.value - one.low for _, one in at], [one.high - one.value for _, one in at]]
                look = {"color": color(series[label]), "capsize": 2, "elinewidth": 1.4}
                axes.errorbar(values, y, xerr=np.maximum(sides, 0), fmt="o", ms=4, label=_legend_text(label), **look)
            axes.axvline(0, color=PALETTE["ink"][0], linewidth=0.8)
            low, high = min(0.0, *ends), max(0.0, *ends)
            margin = 0.06 * (high - low) or 1.0
            axes.set(xlim=(low - margin, high + margin), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel)
            axes.set_yticks(range(len(rows)), names)
            axes.grid(axis="y", visible=False)
        found += finished
    return found


def radar(
    name: str, title: str, spokes: Sequence[str], runs: Mapping[str, Values], series: Mapping[str, int]
) -> list[Figure]:
    """Draw radar charts: runs as polygons, values 0 … 100; the centre is a multiple of ten at least 5 below the least value.

    More runs than there are colours are drawn in several charts with the same axis.
    """
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    everything = np.concatenate([np.asarray(values, dtype=float) for values in runs.values()])
    low = max(0.0, np.floor((everything.min() - 5) / 10) * 10)
    high = min(100.0, np.ceil((everything.max() + 1) / 10) * 10)
    polar = {"projection": "polar"}
    found = []
    for part, subtitle, labels in _parts(name, title, runs, series):
        with (
            matplotlib_ready("report") as pyplot,
            _axes(pyplot, part, subtitle, labels, 4.0, polar) as (axes, finished),
        ):
            axes.set_theta_offset(np.pi / 2)
            axes.set_theta_direction(-1)
            for label in labels:
                values, number = runs[label], series[label]
                closed = np.append(values, values[0])
                around = np.append(angles, angles[0])
                look = {"color": color(number), "linestyle": style(number), "marker": "o", "ms": 3}
                axes.plot(around, closed, label=_legend_text(label), **look)
                axes.fill(around, closed, color=color(number), alpha=0.08)
            axes.set_ylim(low, high)
            axes.set_xticks(angles, spokes)
            axes.tick_params(axis="x", pad=6)
            sides = np.sin(angles)  # the spokes run clockwise from the top
            for word, side in zip(axes.get_xticklabels(), sides, strict=True):
                word.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
            axes.tick_params(axis="y", labelsize=7)
            axes.set_rlabel_position(180 / len(spokes))
            axes.spines["polar"].set_color(PALETTE["grid"][0])
        found += finished
    return found


def _parts(
    name: str, title: str, labels: Collection[str], series: Mapping[str, int]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (name, title, labels) of figures in which no colour occurs twice; a teacher is in each of them."""
    teachers = [label for label in labels if series[label] == TEACHER]
    others = sorted((label for label in labels if series[label] != TEACHER), key=series.__getitem__)
    parts = _without_repetition(others, series)
    for place, part in enumerate(parts, 1):
        several = len(parts) > 1
        end = f", {place} of {len(parts)}" if several else ""
        yield f"{name}-{place}" if several else name, title + end, [*part, *teachers]


def _without_repetition(labels: list[str], series: Mapping[str, int]) -> list[list[str]]:
    """Divide labels, in the order of their series, by halves, into parts that repeat no colour."""
    if len({series[label] % len(SERIES) for label in labels}) == len(labels):
        return [labels]
    middle = (len(labels) + 1) // 2
    return _without_repetition(labels[:middle], series) + _without_repetition(labels[middle:], series)


@contextmanager
def _axes(
    pyplot: Any,
    name: str,
    title: str,
    labels: Sequence[str] = (),
    height: float = SIZE[1],
    subplot: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Any, list[Figure]]]:
    """Yield (axes, list), and after the block's end append the figure to the list, with its title and the legend of `labels`.

    Args:
        height: inches, of a figure with a title of one line and no legend.
    """
    text = _title(title)
    columns, rows = _legend_shape([_legend_text(label) for label in labels])
    height += LINE * (text.count("\n") + rows) + (0.1 if rows else 0)
    figure, axes = pyplot.subplots(figsize=(SIZE[0], height), subplot_kw=dict(subplot or {}))
    finished: list[Figure] = []
    yield axes, finished
    axes.patch.set_gid("data")
    figure.suptitle(text)
    if labels:
        figure.legend(loc="outside lower center", ncols=columns).set_gid("legend")
    finished.append(finish(figure, name, title))


def _title(title: str) -> str:
    """Break a title into lines that fit a figure's width; it may hold the name of a run."""
    for characters in range(TITLE_CHARACTERS, 10, -4):
        text = wrapped(title, characters)
        if all(_points(line, 10) <= SIZE[0] * 72 - 8 for line in text.split("\n")):
            break
    return text


def _legend_text(label: str) -> str:
    """Break a label so that it fits the width of a legend with one column."""
    return textwrap.fill(label, 52)


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    """Return (columns, lines) of a legend that is no wider than a figure; (1, 0) without labels."""
    if not labels:
        return 1, 0
    widest = max(_points(line, LEGEND_SIZE) for label in labels for line in label.split("\n")) + HANDLE
    columns = int(max(1, min(LEGEND_COLUMNS, len(labels), (SIZE[0] * 72 - 8) // widest)))
    tallest = max(label.count("\n") + 1 for label in labels)
    return columns, -(-len(labels) // columns) * tallest


def _points(text: str, size: float) -> float:
    """Return the width of one line of text, in points."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().width) if text.strip() else 0.0


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
