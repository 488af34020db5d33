"""The common style of all figures: colours, line styles, limits of axes, titles and legends.

The colours of the series are distinguishable with the common kinds of colour blindness and have a contrast of 3 or more to their
page (tests/reporting/test_figures.py); every series also has its own line style. A figure has at most `len(SERIES)` series and a
teacher, so that no colour occurs twice in it.
"""

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from switchkd.errors import ConfigError

# CSS variable → (on a light page, on a dark page). Matplotlib draws with the light values.
PALETTE = {
    "ink": ("#1a1f26", "#e6e9ee"),
    "grid": ("#cfd6de", "#3a424d"),
    "s0": ("#0f62ae", "#62b0f2"),
    "s1": ("#bd4e0a", "#f59b52"),
    "s2": ("#0e8060", "#4fd1a5"),
    "s3": ("#a03a7d", "#f0a5d6"),
    "s4": ("#8c25f4", "#9b4dff"),
    "s5": ("#5c3204", "#b5651d"),
    "s6": ("#739550", "#adfa9e"),
    "s7": ("#3e09aa", "#da2455"),
    "teacher": ("#33363d", "#e2e6ec"),
}
PAGES = ("#ffffff", "#15181d")  # background, light and dark
CARDS = ("#f5f7f9", "#1e232a")  # background of a figure in a page
SERIES = [name for name in PALETTE if name.startswith("s")]
TEACHER = -1  # the series of a teacher, in every figure
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
TITLE_LINES = 4  # a longer title is cut
NEAR_ZERO = 0.25  # an axis begins at 0 if its least value is less than this share of its largest
LOG_ABOVE = 20.0  # an axis is logarithmic if its largest value is more than this multiple of the median


def color(series: int) -> str:
    """Return the colour of the n-th series, or of TEACHER, for matplotlib; colours repeat, with other line styles."""
    return PALETTE["teacher" if series == TEACHER else SERIES[series % len(SERIES)]][0]


def style(series: int) -> Any:
    """Return the line style of the n-th series, or of TEACHER."""
    return "-" if series == TEACHER else LINES[(series + series // len(SERIES)) % len(LINES)]


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
        "figure.titlesize": 10,
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


def wrapped(title: str, width: int, lines: int = TITLE_LINES) -> str:
    """Break a title into lines of at most `width` characters; what exceeds `lines` lines is cut, with " …" at the end."""
    return "\n".join(textwrap.wrap(title, width, max_lines=lines, placeholder=" …"))


def whole_numbers(axis: Any) -> None:
    """Put the ticks of a matplotlib axis at whole numbers only: there is no step 1.5."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def show_differences(axes: Any, values: Iterable[float]) -> None:
    """Fit the y axis to the values that are drawn, so that their differences are seen.

    The axis begins at 0 only if the least value is near it, and is logarithmic if few values are far above the others.
    """
    drawn = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if not len(drawn):
        return
    low, high = float(drawn.min()), float(drawn.max())
    if low > 0 and high > LOG_ABOVE * float(np.median(drawn)):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        return
    if low == high == 0:
        axes.set_ylim(-0.02, 1.0)
        return
    margin = 0.06 * (high - low) or 0.05 * abs(high)
    begins_at_0 = 0 <= low < NEAR_ZERO * high
    axes.set_ylim(-0.02 * high if begins_at_0 else low - margin, high + margin)
