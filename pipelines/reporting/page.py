"""The pages of `report` and `attend`: their parts, and how a template is filled. Everything is escaped; scripts are forbidden."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import switchkd
from switchkd.errors import ConfigError
from switchkd.pipelines.drawing import CARDS, PAGES, PALETTE
from switchkd.pipelines.reporting.figures import Figure
from switchkd.pipelines.reporting.samples import Chosen
from switchkd.pipelines.run_folder import write_atomically

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list["Table"] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # how to obtain what is left out
    chosen: Chosen | None = None
    details: list["Details"] = field(default_factory=list)


@dataclass(frozen=True)
class Details:
    """Names and values under headings, folded in under a title."""

    title: str
    lists: dict[str, dict[str, str]]  # heading → name → value


@dataclass(frozen=True)
class Table:
    """A table; the first column contains the row names."""

    head: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """The columns of numbers, which are right-aligned."""
        return [all(row[i][:1] in "+-0123456789" for row in self.rows) for i in range(len(self.head))]


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill one of the package's page templates, everything escaped, and write it. Raises ConfigError if jinja2 is missing."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError("pages are made with jinja2: pip install 'switchkd[viz]'") from None
    places = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    places.filters |= {"code": _code, "quoted": repr}
    places.globals |= {"palette": PALETTE | {"page": PAGES, "card": CARDS}, "version": switchkd.__version__}
    write_atomically(path, places.get_template(template).render(**content))


def _code(text: str) -> Any:
    """Escape a line of this package's text, and format text in backticks as code."""
    from markupsafe import Markup, escape

    pieces = [escape(piece) for piece in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(pieces))
