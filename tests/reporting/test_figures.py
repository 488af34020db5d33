"""Pictures: colours that everybody can tell apart on both pages, SVG that takes them from the page, text that stays text."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from colours import linear, luminance

pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")

from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.figures import PAGES, PALETTE, SERIES

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
    for name in SERIES:
        assert contrast(PALETTE[name][page], PAGES[page]) >= 3, name
    assert contrast(PALETTE["ink"][page], PAGES[page]) >= 7


@pytest.mark.parametrize("page", (0, 1))
@pytest.mark.parametrize("kind", DICHROMACIES)
def test_series_keep_apart_for_the_colour_blind(page, kind):
    """A CIE76 distance of 10 is told at a glance; the first two series, teacher and student, keep 20."""
    seen = {name: lab(np.clip(np.array(DICHROMACIES[kind]) @ linear(PALETTE[name][page]), 0, 1)) for name in SERIES}
    for one, other in itertools.combinations(SERIES, 2):
        least = 20 if {one, other} == {"s0", "s1"} else 10
        assert np.linalg.norm(seen[one] - seen[other]) >= least, (one, other)


def test_no_two_series_look_alike():
    looks = [(figures.color(i), str(figures.style(i))) for i in range(10)]
    assert len(set(looks)) == 10
    assert len({style for _, style in looks[:5]}) == 5


def drawn():
    curves = {"sft": ([1, 2, 3], [3.0, 2.0, 1.0]), "$x <b>": ([3], [0.5])}
    return figures.lines("loss", "A <loss>", curves, "step", "nats", {"sft": 0, "$x <b>": 1})


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
    edges = figures._edges(np.array([2.0, 3.0, 3.0, 7.0]), 50)
    assert edges.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert len(figures._edges(np.array([0.0, 0.1, 9.0]), 50)) == 51
    assert len(figures._edges(np.array([3.0, 3.0]), 50)) == 2


def test_a_histogram_of_one_value_and_a_radar_are_drawn():
    figures.histogram("h", "knees", {"teacher": [4, 4, 4], "student": np.empty(0)}, "k", {"teacher": 4, "student": 0})
    shape = figures.radar(
        "r", "radar", ["a", "b", "c"], {"one": [50, 60, 70], "two": [0, 100, 30]}, {"one": 0, "two": 1}
    )
    assert "one" in shape.svg and shape.png[:4] == b"\x89PNG"


def test_titles_stay_within_the_figure():
    """Row 25 of the faults found by outside trials: a title with the names of runs ran over the edge."""
    from matplotlib.textpath import TextPath

    title = "Mean knee of a-run-with-quite-a-long-name-of-its-own and its teacher, by step"
    lines = figures._wrapped(title).split("\n")
    assert " ".join(lines) == title
    for line in lines:
        assert TextPath((0, 0), line, size=10).get_extents().width < figures.SIZE[0] * 72
