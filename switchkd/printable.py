"""Text of the data, made safe to print: control characters are escaped, and a long text can be shortened.

A data file, a file name or a model's answer may hold the escape sequences of terminals, or characters that change the order in
which text is displayed. Every text of the data that is printed or quoted in an error passes through `printable`.
"""

import re

# C0 without tab and line feed, DEL, C1; line and paragraph separators; controls of the direction of text; lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

_MARKDOWN = re.compile(r"[\\`*\[\]<>|#]")


def printable(text: object, limit: int | None = None) -> str:
    r"""Return a text with its control characters escaped, as in "\x1b[31m"; tabs and line feeds stay.

    Args:
        text: converted by `str`. limit: characters after which the text is cut, with a note of its length.
    """
    words = str(text)
    if limit is not None and len(words) > limit:
        words = f"{words[:limit]}… ({len(words):,} characters)"
    return _UNSAFE.sub(lambda found: _escape(ord(found[0])), words)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def markdown_text(text: object) -> str:
    """Return a text on one line for Markdown: controls escaped, and nothing of it taken as a link, HTML, code or a cell."""
    words = " ".join(printable(text).split())
    return _MARKDOWN.sub(r"\\\g<0>", words)
