"""The documents as a whole: the site builds without a warning, shows every page, fetches nothing; generated pages are current."""

import html
import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from docs_pages import ROOT, build_site

from switchkd.pipelines.stored_teacher import TOPK_GRADIENT_ERROR, WINDOW_GRADIENT_ERROR

DOCS = ROOT / "docs"
MADE_AT_BUILD = {"store-format.md"}  # docs/site/build.py adds stores/README.md under this name


def nav_pages(entry):
    """The files of a `nav` of mkdocs.yml."""
    if isinstance(entry, str):
        yield entry
    for child in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from nav_pages(child)


def test_the_nav_shows_every_page_once():
    nav = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {path.name for path in DOCS.glob("*.md")} | MADE_AT_BUILD
    assert set(nav) - pages == set(), "mkdocs.yml shows pages that are not in docs/"
    assert pages - set(nav) == set(), "add these pages of docs/ to `nav` in mkdocs.yml"
    assert len(nav) == len(set(nav))


def test_the_page_of_commands_is_current():
    code = "import runpy; print(runpy.run_path('docs/site/commands.py')['page'](), end='')"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "commands.md").read_text(encoding="utf-8"), "docs/commands.md is old: run `make commands`"


def test_the_table_of_families_is_current():
    made = runpy.run_path(str(DOCS / "site/families.py"))["page"]()
    assert made == (DOCS / "families.md").read_text(encoding="utf-8"), "docs/families.md is old: run `make commands`"


def test_warnings_name_the_gradient_error_of_the_table():
    """The figure in warnings about payload topk is that of the default topk in docs/payloads-table.md, for two students."""
    lines = (DOCS / "payloads-table.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (heads,) = [row for row in cells if row[:2] == ["payload", "knee"]]
    (found,) = [dict(zip(heads, row, strict=True)) for row in cells if row[:2] == ["topk, k = 128, default steps", ""]]
    errors = sorted(round(float(found[student].rstrip("%"))) for student in ("noise 0.07", "noise 0.38"))
    assert "{} to {} %".format(*errors) == TOPK_GRADIENT_ERROR
    (windowed,) = [row for row in cells if row[0] == "window 128: quantised, with the code"]
    errors = sorted(round(float(cell.rstrip("%"))) for cell in windowed[1:6])
    assert f"{errors[0]} to {errors[-1]} %" == WINDOW_GRADIENT_ERROR


def test_the_figure_of_the_gradient_shows_what_its_script_computes():
    computed = asdict(runpy.run_path(str(DOCS / "site/gradient_figure.py"))["curve"]())
    picture = (DOCS / "gradient.svg").read_text(encoding="utf-8")
    (description,) = re.findall(r"<dc:description>(.*?)</dc:description>", picture, re.DOTALL)
    shown = json.loads(html.unescape(description))
    assert shown.keys() == computed.keys()
    for name, values in computed.items():
        assert shown[name] == pytest.approx(values, abs=1e-9), f"{name}: run `python docs/site/gradient_figure.py`"


def test_the_figure_of_the_gradient_is_the_same_when_drawn_again(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib: extra `viz`")
    script = runpy.run_path(str(DOCS / "site/gradient_figure.py"))
    for name in ("one.svg", "two.svg"):
        script["draw"](script["curve"](), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_figure_of_the_stages_is_what_its_script_draws():
    drawn = runpy.run_path(str(DOCS / "site/stages_figure.py"))["draw"]()
    found = (DOCS / "stages.svg").read_text(encoding="utf-8")
    assert found == drawn, "run `python docs/site/stages_figure.py`"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("zensical", "latex2mathml"):
        pytest.importorskip(package, reason="building the site needs the packages of the extra `docs`")
    return build_site(tmp_path_factory.mktemp("site"))


def test_the_site_has_every_page_and_the_specification(site):
    for page in nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]):
        assert (site / page).with_suffix(".html").is_file()
    text = (site / "store-format.html").read_text(encoding="utf-8")
    assert "What a reader must check" in text
    assert not list(site.rglob("*.py"))


def test_the_site_fetches_nothing(site):
    """Scripts, styles, fonts and pictures are the site's own; only links that a reader clicks go elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:[^"]*)"', text)
        fetched += re.findall(
            r'<link\b[^>]*\brel="(?:stylesheet|preconnect|preload)"[^>]*\bhref="(https?:[^"]*)"', text
        )
        assert not fetched, f"{page.name}: {fetched}"


def test_formulas_became_mathml(site):
    for page in DOCS.glob("*.md"):
        if "```math" in page.read_text(encoding="utf-8"):
            formulas = re.findall(
                r"<math.*?</math>", (site / page.name).with_suffix(".html").read_text(encoding="utf-8")
            )
            assert len(formulas) == page.read_text(encoding="utf-8").count("```math")
            assert not [formula for formula in formulas if "\\" in formula], "LaTeX that latex2mathml does not know"
