"""What MkDocs must know beyond Markdown: formulas as MathML, and the store's specification as a page of the site.

A fence ```math holds LaTeX, which GitHub shows by itself; here it becomes MathML, which browsers draw without a script.
The specification stays one file, stores/README.md, that lies beside the code and in the wheel.
"""

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SPECIFICATION = Path(__file__).parents[2] / "stores/README.md"
PAGE = "store-format.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Teach the fences the language `math`."""
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": _formula}
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the specification to the site."""
    files.append(File.generated(config, PAGE, abs_src_path=str(SPECIFICATION)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the specification at its page."""
    return markdown.replace("](../stores/README.md", f"]({PAGE}")


def _formula(source: str, *_: Any, **__: Any) -> str:
    source, _, rest = source.partition("\\tag{")
    number = f'<span class="number">({rest.partition("}")[0]})</span>' if rest else ""
    return f'<div class="formula">{convert(source, display="block")}{number}</div>'
