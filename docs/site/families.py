"""Write the table in docs/families.md from the families themselves: `python docs/site/families.py`."""

from pathlib import Path

import click

from switchkd.models.family_table import markdown_table

PAGE = Path(__file__).parents[1] / "families.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


def page() -> str:
    """Return the page's Markdown, its table made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    click.echo(f"written: {PAGE}")
