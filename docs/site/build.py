"""Build the documents as a site, with Zensical: `python docs/site/build.py [FOLDER]`, the folder being build/ if none is given.

Two things in docs/ are written for whoever reads them beside the code, and differ on the site. A fence ```math holds LaTeX, which
GitHub shows by itself; here it becomes MathML, which browsers draw without a script. The specification of the store stays one file,
stores/README.md, that lies beside the code and in the wheel; here it is a page. So FOLDER/docs gets a copy of the pages with both
changed, and FOLDER/site the pages built from it.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
SPECIFICATION = ROOT / "stores/README.md"
PAGE = "store-format.md"


def build(folder: Path) -> int:
    """Build the site into `folder`/site; what was there is removed.

    Returns:
        The exit status of Zensical: not 0 if there is anything to warn of, such as a link that leads nowhere.
    """
    if (folder / "docs").resolve() == ROOT / "docs":
        print(f"{folder} holds the documents themselves: build into another folder", file=sys.stderr)
        return 2
    for made in ("docs", "site"):
        shutil.rmtree(folder / made, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(SPECIFICATION, folder / "docs" / PAGE)
    shutil.copy(ROOT / "mkdocs.yml", folder / "mkdocs.yml")
    for page in (folder / "docs").glob("*.md"):
        page.write_text(for_site(page.read_text(encoding="utf-8")), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    return subprocess.run(command, cwd=folder).returncode


def for_site(markdown: str) -> str:
    """Return a page as the site shows it: formulas as MathML, links to the specification leading to its page."""
    markdown = re.sub(
        r"^```math\n(.*?)^```$", lambda found: _formula(found[1]), markdown, flags=re.DOTALL | re.MULTILINE
    )
    return markdown.replace("](../stores/README.md", f"]({PAGE}")


def _formula(source: str) -> str:
    source, _, rest = source.strip().partition("\\tag{")
    number = f'<span class="number">({rest.partition("}")[0]})</span>' if rest else ""
    return f'<div class="formula">{convert(source, display="block")}{number}</div>'


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build"))
