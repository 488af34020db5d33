"""The documents as tests see them: pages, their code blocks, the words in backticks, the commands in a block.

A block is fenced and names its language. `bash` and `python` blocks are run, in the order of the page, in one folder
(`test_docs_code.py` says what lies in it). HTML comments, which no reader sees, direct this:

    <!-- not run: REASON -->     before a block that cannot run here; its switchkd commands are still checked
    <!-- slow: REASON -->        before a block that takes long; `make test-slow` runs it
    <!-- before: COMMANDS -->    shell commands that stand for what the reader has done before; several lines will do
    ```yaml title="run.yaml"     the block is also a file of that name for the blocks after it
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "stores/README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text", "console", "math"}
_DIRECTIVE = re.compile(r"<!--\s*(not run|slow|before):\s*(.*?)\s*-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block of a page."""

    page: Path
    line: int  # of its fence, from 1
    language: str  # "" for an indented block
    title: str
    content: str
    directive: str = ""  # not run, slow
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page.name if self.page.parent.name != 'stores' else 'stores/README.md'}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page in order; a `before` comment is a bash block."""
    found: list[Block] = []
    directive, reason = "", ""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        line = (token.map or [0])[0] + 1
        if token.type == "html_block" and (match := _DIRECTIVE.match(token.content)):
            if match[1] == "before":
                found.append(Block(page, line, "bash", "", match[2]))
            else:
                directive, reason = match[1], match[2]
        elif token.type in ("fence", "code_block"):
            language, _, rest = token.info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            found.append(Block(page, line, language, title[1] if title else "", token.content, directive, reason))
            directive = reason = ""
    return found


def code_spans(page: Path) -> list[str]:
    """Return the words in single backticks."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


_KEYWORDS = {"{", "}", "do", "done", "then", "else", "fi"}


def commands(text: str, program: str) -> list[list[str]]:
    """Return the words after every call of `program` in shell text, wherever it stands in a line; variables stay as written."""
    found: list[list[str]] = []
    for line in _lines(text):
        words: list[str] | None = None
        for word in line:
            if word in _KEYWORDS or not set(word) - set("();<>|&"):
                words = None
            elif words is not None:
                words.append(word)
            elif word == program or word.endswith(f"/{program}"):
                words = []
                found.append(words)
    return found


def _lines(text: str) -> list[list[str]]:
    """Split shell text into the words of its lines, quotes and comments as the shell reads them."""
    found, pending = [], ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            found.append(list(lexer))
        except ValueError:  # a quote goes on in the next line
            pending += "\n"
            continue
        pending = ""
    return found


def build_site(out):
    """Build the site below a folder, and return where; a warning of Zensical is an error."""
    command = [sys.executable, "docs/site/build.py", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "site"
