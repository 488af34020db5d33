"""Pictures: colours that everybody can tell apart on both pages, SVG that takes them from the page, text that stays text."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from colours import linear, luminance

pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")

from switchkd.pipelines import drawing
from switchkd.pipelines.drawing import CARDS, PAGES, PALETTE, SERIES, TEACHER
from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.figures import Interval

COLOURS = [*SERIES, "teacher"]

# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as people with the dichromacy see it.
DICHROMACIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}


def contrast(one, other):
    """WCAG's contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    """Linear RGB → CIE L*a*b* (D65)."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("page", (0, 1))
def test_series_stand_out_from_the_page(page):
    for background in (PAGES[page], CARDS[page]):
        for name in COLOURS:
            assert contrast(PALETTE[name][page], background) >= 3, name
        assert contrast(PALETTE["ink"][page], background) >= 7


@pytest.mark.parametrize("page", (0, 1))
@pytest.mark.parametrize("kind", DICHROMACIES)
def test_series_keep_apart_for_the_colour_blind(page, kind):
    """A CIE76 distance of 10 is told at a glance; the first two series, teacher and student, keep 20."""
    seen = {name: lab(np.clip(np.array(DICHROMACIES[kind]) @ linear(PALETTE[name][page]), 0, 1)) for name in COLOURS}
    for one, other in itertools.combinations(COLOURS, 2):
        least = 20 if {one, other} == {"s0", "s1"} else 10
        assert np.linalg.norm(seen[one] - seen[other]) >= least, (one, other)


def test_no_two_series_look_alike():
    looks = [(drawing.color(i), str(drawing.style(i))) for i in (TEACHER, *range(16))]
    assert len(set(looks)) == 17
    assert len({color for color, _ in looks[: len(SERIES) + 1]}) == len(SERIES) + 1
    looks = looks[1:]
    assert len({style for _, style in looks[:5]}) == 5


def drawn():
    curves = {"sft": ([1, 2, 3], [3.0, 2.0, 1.0]), "$x <b>": ([3], [0.5])}
    (figure,) = figures.lines("loss", "A <loss>", curves, "step", "nats", {"sft": 0, "$x <b>": 1})
    return figure


def test_the_svg_takes_its_colours_from_the_page():
    svg = drawn().svg
    ET.fromstring(svg)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"ink", "grid", "s0", "s1"}
    colors = set(re.findall(r"#[0-9a-fA-F]{6}", re.sub(r'(href="#|url\(#)[^")]*', "", svg)))
    assert colors <= {"#ffffff", "#000000"}, colors
    assert "<metadata" not in svg and "<?xml" not in svg


def test_text_stays_text_and_is_escaped():
    svg = drawn().svg
    words = [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
    assert {"A <loss>", "step", "nats", "sft", "$x <b>"} <= set(words)
    assert 'aria-label="A &lt;loss&gt;"' in svg


def test_ids_belong_to_their_picture():
    """Two drawings in one page must not share ids: a clip path of one would cut the other."""
    svg = drawn().svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids and all(name.startswith("loss-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_the_same_data_give_the_same_files():
    assert drawn() == drawn()


def test_whole_numbers_get_a_bin_each():
    edges = figures.bin_edges(np.array([2.0, 3.0, 3.0, 7.0]), 50)
    assert edges.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert len(figures.bin_edges(np.array([0.0, 0.1, 9.0]), 50)) == 51
    assert len(figures.bin_edges(np.array([3.0, 3.0]), 50)) == 2


def test_a_histogram_of_one_value_and_a_radar_are_drawn():
    groups = {"teacher": [4, 4, 4], "student": np.empty(0)}
    figures.histogram("h", "knees", groups, "k", {"teacher": TEACHER, "student": 0})
    runs = {"one": [50, 60, 70], "two": [0, 100, 30]}
    (shape,) = figures.radar("r", "radar", ["a", "b", "c"], runs, {"one": 0, "two": 1})
    assert "one" in shape.svg and shape.png[:4] == b"\x89PNG"


LONG = "a-run-with-quite-a-long-name-of-its-own-that-tells-every-option-of-it"


@pytest.mark.parametrize("name", ["a run", LONG, "W" * 90])
def test_titles_stay_within_the_figure(name):
    """Row 25 of the faults found by outside trials: a title with the names of runs ran over the edge."""
    from matplotlib.textpath import TextPath

    title = f"Mean knee of {name} and its teacher, by step, " * 2
    lines = figures._title(title).split("\n")
    assert len(lines) <= drawing.TITLE_LINES
    assert "".join(lines).replace(" ", "") == title.replace(" ", "") or lines[-1].endswith(" …")
    for line in lines:
        assert TextPath((0, 0), line, size=10).get_extents().width < figures.SIZE[0] * 72


@pytest.fixture
def open_figures(monkeypatch):
    """Figures are drawn, measured and closed here instead."""
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    for figure in kept:
        close(figure)


def extents(figure):
    """(data, legend, title) of a figure with one pair of axes, and of the whole figure, in pixels."""
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [figure.axes[0].patch, legend, figure._suptitle, figure.patch]
    return [box.get_window_extent() for box in boxes]


def curves_of(count, name="run {}"):
    return {name.format(i): ([1, 2, 3], [i, i + 1.0, i + 0.5]) for i in range(count)}


@pytest.mark.parametrize(("count", "name"), [(1, "a run"), (3, LONG + "{}"), (8, "run {}"), (8, LONG + "{}")])
@pytest.mark.parametrize("title", ["CE", "CE, nats per position, of " + LONG * 5])
def test_a_legend_and_a_title_of_any_size_leave_the_data_alone(open_figures, count, name, title):
    curves = curves_of(count, name)
    figures.lines("loss", title, curves, "step", "nats", {label: i for i, label in enumerate(curves)})
    (figure,) = open_figures
    data, legend, heading, whole = extents(figure)
    assert not data.overlaps(legend) and not data.overlaps(heading) and not legend.overlaps(heading)
    for part in (data, legend, heading):
        assert whole.x0 <= part.x0 and part.x1 <= whole.x1 and whole.y0 <= part.y0 and part.y1 <= whole.y1
    assert data.height > 1.4 * figure.dpi  # inches: it is the figure that grows, not the data that shrink


@pytest.mark.parametrize("numbers", [range(9), range(20), (0, 8), (3, 11, 4)])
def test_no_colour_occurs_twice_in_a_figure(open_figures, numbers):
    curves = {f"run {i}": ([1, 2], [float(i), 5.0]) for i in numbers} | {"its teacher": ([1, 2], [30.0, 31.0])}
    series = {f"run {i}": i for i in numbers} | {"its teacher": TEACHER}
    drawn = figures.lines("knee", "Knee", curves, "step", "k", series)
    assert [figure.name for figure in drawn] == [f"knee-{i}" for i in range(1, len(drawn) + 1)]
    labels, limits = [], set()
    for figure in open_figures:
        colours = [line.get_color() for line in figure.axes[0].lines]
        assert len(set(colours)) == len(colours) > 1
        labels += [line.get_label() for line in figure.axes[0].lines]
        limits.add(figure.axes[0].get_ylim())
    assert sorted(set(labels)) == sorted(curves) and labels.count("its teacher") == len(drawn)
    assert len(limits) == 1  # so that the figures can be compared


def test_an_axis_shows_differences():
    from matplotlib import pyplot

    def limits(values):
        figure, axes = pyplot.subplots()
        drawing.show_differences(axes, values)
        found = (*axes.get_ylim(), axes.get_yscale())
        pyplot.close(figure)
        return found

    low, high, scale = limits([2.05, 2.0, 2.02, float("nan")])
    assert scale == "linear" and 1.98 < low < 2.0 < 2.05 < high < 2.07
    assert -0.03 < limits([0.0, 0.5, 1.0])[0] <= 0  # near 0 it begins there
    assert limits([3.0, 1.0, 1.1, 1.2, 90.0])[2] == "log"  # a peak of the first step hides nothing
    assert limits([0.0, 1.0, 1.1, 1.2, 90.0])[2] == "linear"
    assert limits([0.0, 0.0])[0] < 0 < limits([0.0, 0.0])[1]
    assert limits([4.0])[0] < 4 < limits([4.0])[1]


@pytest.mark.parametrize("steps", [[1], [1, 2], [0, 1, 2, 3], [10, 20, 25]])
def test_steps_and_parts_are_whole_numbers(open_figures, steps):
    figures.lines("loss", "CE", {"a": (steps, [1.0] * len(steps))}, "step", "nats", {"a": 0})
    figures.bars("parts", "Size of the parts", steps, [1.0] * len(steps), "part", "MB")
    for figure in open_figures:
        figure.canvas.draw()
        ticks = list(figure.axes[0].get_xticks())
        assert ticks and all(tick == int(tick) for tick in ticks)


def test_intervals_are_drawn_beside_zero(open_figures):
    rows = {
        "all questions (9)": {"one": Interval(0.1, 0.05, 0.2), "two": Interval(0.0, 0.0, 0.0)},
        "color (5)": {"one": Interval(0.2, 0.1, 0.25)},
    }
    (shown,) = figures.intervals("d", "Difference", rows, "difference", {"one": 0, "two": 1})
    axes = open_figures[0].axes[0]
    low, high = axes.get_xlim()
    assert -0.05 < low < 0 and 0.25 < high < 0.3
    assert [word.get_text() for word in axes.get_yticklabels()] == list(rows)
    assert {"one", "two"} <= {element.text for element in ET.fromstring(shown.svg).iter()}
