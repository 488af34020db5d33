"""Pages as a reader sees them: in a real browser, on a desk and on a phone, light and dark.

Screenshots are kept in pytest's temporary folder, or in the folder that SWITCHKD_SCREENSHOTS names (`make test-browser`).
"""

import os
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import report_runs
import tiny
from chromium import PROGRAM, Page
from colours import luminance
from docs_pages import build_site

pytest.importorskip("matplotlib", reason="reports need the extra `viz`")
pytest.importorskip("jinja2", reason="reports need the extra `viz`")
if PROGRAM is None:
    pytest.skip("no Chromium: `make test-browser` installs it where it may", allow_module_level=True)

from switchkd.pipelines.reporting.attend import attend
from switchkd.pipelines.reporting.options import AttendOptions, ReportOptions
from switchkd.pipelines.reporting.report import report

DESK, PHONE = 1280, 390
EACH_LOOK = pytest.mark.parametrize(
    ("width", "dark"),
    [(DESK, False), (DESK, True), (PHONE, False), (PHONE, True)],
    ids=["desk-light", "desk-dark", "phone-light", "phone-dark"],
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"  # to the side, in pixels
# Elements that stick out to the right of the page and are not inside something that scrolls by itself.
STICKING_OUT = """[...document.querySelectorAll('body *')].filter(e => {
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
  return e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(e => e.outerHTML.slice(0, 120))"""


# Everything that stands on a page as text: [what it is, colour, background below it, whether a picture's line is meant].
CONTRASTS = """(() => {
  const visible = e => e.getClientRects().length > 0;
  const below = e => {
    for (let p = e; p; p = p.parentElement) {
      const color = getComputedStyle(p).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)' && color !== 'transparent') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    if (own && visible(e)) {
      const style = getComputedStyle(e);
      found.push([e.outerHTML.slice(0, 100), e.closest('svg') ? style.fill : style.color, below(e), false]);
    }
    const after = getComputedStyle(e, '::after');
    if (after.content !== 'none' && after.content !== 'normal' && visible(e))
      found.push([e.outerHTML.slice(0, 100), after.color, below(e), false]);
  }
  for (const e of document.querySelectorAll('svg [id*="line2d"] > path, svg [id*="-patch"] > path')) {
    const stroke = getComputedStyle(e).stroke;
    const drawn = e.getAttribute('style') || '';
    if (/stroke: var\\(--(s\\d|teacher)\\)/.test(drawn)) found.push([drawn, stroke, below(e), true]);
  }
  return found;
})()"""
# In each picture: text that sticks out of it, pairs of texts that overlap, a legend or title over the data.
COLLISIONS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const name = svg.getAttribute('aria-label'), box = svg.getBoundingClientRect();
  const shrunk = e => {  // without the empty space above and below the letters
    const r = e.getBoundingClientRect(), h = r.height * 0.15, w = Math.min(1, r.width / 4);
    return {left: r.left + w, right: r.right - w, top: r.top + h, bottom: r.bottom - h, text: e.textContent};
  };
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const texts = [...svg.querySelectorAll('text')].filter(e => e.textContent.trim()).map(shrunk);
  const found = [];
  for (const t of texts)
    if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 1 || t.bottom > box.bottom + 1)
      found.push([name, 'sticks out', t.text]);
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => { if (meet(a, b)) found.push([name, a.text, b.text]); }));
  const data = svg.querySelector('[id$="-data"]').getBoundingClientRect();
  for (const e of svg.querySelectorAll('[id$="-legend"]'))
    if (meet(e.getBoundingClientRect(), data)) found.push([name, 'the legend', 'the data']);
  return found;
})"""
# Boxes of a page that should lie beside or below each other.
OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll('h1, h2, main > p, section > p, .scroll, details, figure, .sample')];
  const found = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.contains(b)) return;
    const r = a.getBoundingClientRect(), s = b.getBoundingClientRect();
    if (r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 1 && s.top < r.bottom - 1)
      found.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80)]);
  }));
  return found;
})()"""
# Cells of tables whose text is squeezed into a narrow column of many lines.
SQUEEZED = """[...document.querySelectorAll('td')].filter(e => {
  const lines = e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).fontSize) / 1.5;
  const own = e.textContent.trim().length;
  return lines > 3 && own > 12 && own < 8 * lines && e.parentElement.children[0] === e;
}).map(e => e.outerHTML.slice(0, 120))"""
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11


def contrast(one, other):
    light, dark = sorted((luminance(rgb(one)), luminance(rgb(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def is_laid_out(page):
    """No overflow to the side, nothing over anything else, text and lines that can be read."""
    assert page.value(OVERFLOW) <= 0
    assert page.value(STICKING_OUT) == []
    assert page.value(OVERLAPS) == []
    assert page.value(COLLISIONS) == []
    assert page.value(SQUEEZED) == []
    found = page.value(CONTRASTS)
    assert len(found) > 5
    faint = [
        (what, color, background)
        for what, color, background, is_line in found
        if contrast(color, background) < (LINE_CONTRAST if is_line else TEXT_CONTRAST)
    ]
    assert faint == []


@pytest.fixture(scope="module")
def report_page(finished_runs, later_runs, tmp_path_factory):
    """A report on everything: long names, more runs than colours, scores on the ten benchmarks, differences from a baseline."""
    folder = tmp_path_factory.mktemp("browser")
    for name, shift in {"teacher": 8, "sft": -6, "switch-kd": 0}.items():
        scores = [66.8, 63.5, 57.8, 79.6, 61.6, 57.9, 29.8, 52.3, 44.9, 87.3]
        report_runs.benchmarks(folder / "benchmarks" / name, [score + shift for score in scores])
    long = "a-run-with-a-name-that-tells-each-of-its-options-and-is-too-long-for-one-line-of-anything"
    copies = [(f"{long}-{i}", finished_runs / "runs/switch-kd") for i in range(2)]
    copies += [(f"seed {i}", finished_runs / "runs/switch-kd") for i in range(3)]
    places = [(None, finished_runs), (None, later_runs), *copies, (None, folder / "benchmarks")]
    options = {"samples": 9, "knees": 4, "knees_store": "t.zarr", "baseline": "eval/sft"}
    return report(ReportOptions(places, folder / "report", **options)).page


@pytest.fixture
def screenshots(tmp_path):
    return Path(os.environ.get("SWITCHKD_SCREENSHOTS", tmp_path))


def rgb(text):
    """ "rgb(1, 2, 3)" → "#010203"."""
    assert text.startswith("rgb("), text
    return "#" + "".join(f"{int(part):02x}" for part in text[4:-1].split(","))


@EACH_LOOK
def test_the_report(report_page, tmp_path, screenshots, width, dark, request):
    with Page(tmp_path / "profile", width, dark, mobile=width == PHONE) as page:
        page.open(report_page.as_uri())
        page.screenshot(screenshots / f"report-{request.node.callspec.id}.png")
        # Nothing of the data ran, nothing was fetched, nothing went wrong.
        assert page.value("document.title") == "Switch-KD report"
        assert [url for url in page.fetched if not url.startswith(("file:", "data:"))] == []
        assert page.complaints == []
        # It is as wide as its place, nothing covers anything else, and every picture and image is drawn in it.
        is_laid_out(page)
        assert sum(is_line for *_, is_line in page.value(CONTRASTS)) > 50
        page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
        is_laid_out(page)
        pictures = page.value("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)")
        assert len(pictures) >= 11 and min(pictures) > 250
        assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.value("document.images.length") >= 7
        # The page and its pictures follow the reader's scheme.
        background = luminance(rgb(page.value("getComputedStyle(document.body).backgroundColor")))
        ink = luminance(rgb(page.value("getComputedStyle(document.querySelector('svg text')).fill")))
        assert (background < 0.05 and ink > 0.5) if dark else (background > 0.9 and ink < 0.05)
        # Text in pictures is large enough to read: 9 points are drawn at no less than 8 pixels.
        scale = "(e => e.getScreenCTM().a)(document.querySelector('svg text'))"
        assert page.value(scale) * 9 > 8


def test_text_of_the_data_stands_in_the_page_as_text(report_page, tmp_path):
    with Page(tmp_path / "profile", DESK, False, mobile=False) as page:
        page.open(report_page.as_uri())
        questions = page.value("[...document.querySelectorAll('.question')].map(e => e.textContent)")
        assert report_runs.ATTACK in questions
        assert page.value("document.scripts.length") == 0
        assert page.value("document.querySelectorAll('img[onerror]').length") == 0


@pytest.fixture(scope="module")
def attention_page(teacher, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attend")
    asked = [(tiny.image(folder / f"{i}.png", i), f"{report_runs.ATTACK} {i}") for i in range(2)]
    attend(AttendOptions(student, asked, teacher, student, template="qa", out=folder))
    return folder / "attend.html"


@EACH_LOOK
def test_the_attention_maps(attention_page, tmp_path, screenshots, width, dark, request):
    with Page(tmp_path / "profile", width, dark, mobile=width == PHONE) as page:
        page.open(attention_page.as_uri())
        page.screenshot(screenshots / f"attend-{request.node.callspec.id}.png")
        assert page.value("document.title") == "Where the models look"
        assert page.complaints == []
        is_laid_out(page)
        assert page.value("document.querySelectorAll('.ramp').length") == 2
        widths = page.value("[...document.querySelectorAll('.ramp')].map(e => e.getBoundingClientRect().width)")
        assert min(widths) >= 64
        tops = page.value("[...document.querySelectorAll('.maps')].map(m => [...m.children].map(e => e.offsetTop))")
        assert [len(row) for row in tops] == [4, 4]
        # On a desk the four pictures of a question stand side by side, on a phone one below the other.
        assert all(len(set(row)) == (1 if width == DESK else 4) for row in tops)
        sides = page.value(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        assert all(complete and natural >= 200 and shown > 150 for complete, natural, shown in sides)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical", reason="building the site needs the packages of the extra `docs`")
    return build_site(tmp_path_factory.mktemp("site"))


@EACH_LOOK
def test_the_site(site, tmp_path, screenshots, width, dark, request):
    """Formulas are drawn, long lines scroll within their place, nothing is fetched from elsewhere."""
    with Page(tmp_path / "profile", width, dark, mobile=width == PHONE) as page:
        for name in ("index", "method", "commands", "payloads"):
            page.open((site / f"{name}.html").as_uri())
            if name in ("index", "method"):
                page.screenshot(screenshots / f"site-{name}-{request.node.callspec.id}.png")
            assert page.value(OVERFLOW) <= 0, name
            assert [url for url in page.fetched if not url.startswith(("file:", "data:", "blob:"))] == []
            background = luminance(rgb(page.value("getComputedStyle(document.body).backgroundColor")))
            assert (background < 0.05) if dark else (background > 0.9)
        page.open((site / "method.html").as_uri())
        heights = page.value("[...document.querySelectorAll('math')].map(e => e.getBoundingClientRect().height)")
        assert len(heights) >= 15 and min(heights) > 10


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """Serve a folder on loopback, as `python -m http.server` does; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# The text of everything that the page draws in a shadow root, such as the dialog of the search.
SHADOWS = """(() => {
    const found = [];
    const walk = node => {
        for (const child of node.children) {
            if (child.shadowRoot) { found.push(child.shadowRoot.textContent); walk(child.shadowRoot); }
            walk(child);
        }
    };
    walk(document.body);
    return found.join("");
})()"""


def test_the_sites_search_needs_no_network(site, tmp_path):
    with served(site) as address, Page(tmp_path / "profile", DESK, dark=False, mobile=False) as page:
        page.open(f"{address}/index.html")
        page.value("document.querySelector('.md-search__button').click()")
        deadline = time.monotonic() + 30
        while "The knee and the order" not in (text := page.value(SHADOWS)):
            assert time.monotonic() < deadline, text[:500]
            page.send("Input.insertText", text="knee" if "knee" not in page.value(SHADOWS) else "")
            time.sleep(0.5)
        assert [url for url in page.fetched if not url.startswith((address, "data:", "blob:"))] == []
        assert page.complaints == []
