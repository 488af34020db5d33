"""The wheel holds one package with everything in it, and the documents tell the truth about the tree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from switchkd.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "switchkd": "switchkd",
    "stores": "switchkd/stores",
    "pipelines": "switchkd/pipelines",
    "cli": "switchkd/cli",
}
SHIPPED = {".py", ".safetensors", ".yaml", ".html", ".sbatch", ".sh"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a clean copy of the tracked tree, built with the setuptools of this environment."""
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77 or newer")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_only_switchkd(wheel):
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"switchkd"}


def test_the_wheel_holds_every_file_of_the_tree(wheel):
    names = set(wheel.namelist())
    for folder, place in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SHIPPED and "__pycache__" not in path.parts:
                assert f"{place}/{path.relative_to(ROOT / folder)}" in names


def test_pins_satisfy_the_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["demo"] + extras["viz"] + extras["docs"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_contributing_shows_the_tree_as_it_is():
    """Every folder of the package with a line on what it holds, and no other; every file that the table names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = set(re.findall(r"^ {4}(\S+/)\s+\S", text, re.MULTILINE))
    there = {
        f"{path.parent.relative_to(ROOT)}/"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if any(file.name != "__init__.py" for file in path.parent.glob("*.py"))
    }
    assert shown == there | {"benchmarks/", "docs/", "tests/"}
    for name in re.findall(r"`((?:switchkd|stores|pipelines|cli)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which is not there"


def test_the_readme_names_every_command_and_extra():
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"switchkd {command}" in readme
    for extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]:
        assert f"`{extra}`" in readme


def test_the_readmes_first_screen_shows_the_four_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for command in ("make demo", "make test", "switchkd cache-teacher", "switchkd train"):
        assert command in first_screen
