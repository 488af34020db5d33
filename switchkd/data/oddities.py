"""What may be wrong with a row that can be read: an image under a key that is not read, text that speaks of an absent image, …"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from switchkd.counting import counted
from switchkd.data.containers import IMAGE_COLUMNS
from switchkd.data.templates import IMAGE_MARKER

_IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".heic", ".heif", ".avif", ".svg", ".jp2",
}  # fmt: skip
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
_LONGEST_PATH = 4096

# What other projects write where an image stands: <img>, <image_1>, <|image_pad|>, <ImageHere>, [IMG], <im_patch>, <picture>.
_PLACEHOLDER = re.compile(
    r"<\|?(?:begin_of_|vision_)?(?:image|img|im_patch|picture|vision_start)"
    r"(?:[ _-]?(?:\d+|pad|here|token|placeholder|start))*\|?/?>"
    r"|\[(?:IMG|IMAGE)\]|\{image\}|<video>",
    re.IGNORECASE,
)
# Tokens that end or begin turns in the templates of common models; as text of a row they may become real ones.
_CONTROL = re.compile(
    r"<\|(?!image|img|vision)[A-Za-z_]{2,30}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos)>"
)

NO_IMAGE = "without an image: text holds"
HOLDS_NULL = "is a list that holds null"
MENTION = re.compile(r"\b(?:this|the|above|given) (?:image|picture|photo|photograph)\b", re.IGNORECASE)


def notes_on(turns: Sequence[tuple[str, str]], has_image: bool) -> list[str]:
    """Return what is odd about a row's turns: words for a kind, equal in all rows of the kind, so that they can be counted."""
    found: list[str] = []
    texts = [text for turn in turns for text in turn]
    placeholders = {match for text in texts for match in _PLACEHOLDER.findall(text) if len(match) < 30}
    if placeholders:
        start = "text holds" if has_image else NO_IMAGE
        found += [f"{start} {word}, which is not {IMAGE_MARKER}" for word in sorted(placeholders)]
    elif not has_image and any(MENTION.search(question) for question, _ in turns):
        found.append(f"{NO_IMAGE} a mention of an image")
    found += [
        f"text holds {token}, as control tokens look"
        for token in sorted({m for t in texts for m in _CONTROL.findall(t)})
    ]
    if any(not answer for _, answer in turns):
        found.append("an answer is empty")
    return found


def warnings_about(notes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a line for each kind of row that may lack its image.

    Args:
        notes: note → rows, from `SampleFile.notes`.
    """
    return [
        f"{counted(len(rows), 'row')}, {note} (the first is row {rows[0]}); used without an image"
        for note, rows in sorted(notes.items())
        if note.startswith(NO_IMAGE) or note.endswith(HOLDS_NULL)
    ]


def key_like_an_image(row: dict[str, Any]) -> str | None:
    """Return the first key of a row, among those that are not read, whose value is an image's path or bytes."""
    return next((str(key) for key, value in row.items() if key not in IMAGE_COLUMNS and _is_like_an_image(value)), None)


def _is_like_an_image(value: Any) -> bool:
    if isinstance(value, list) and value:
        return all(map(_is_like_an_image, value[:4]))
    if isinstance(value, dict):
        return any(_is_like_an_image(value.get(name)) for name in ("path", "bytes", "url"))
    if isinstance(value, bytes):
        return value.startswith(_IMAGE_STARTS) or (value.startswith(b"RIFF") and value[8:12] == b"WEBP")
    if not isinstance(value, str):
        return False
    path = value.partition("?")[0] if value.startswith(("http://", "https://")) else value
    return value.startswith("data:image/") or (
        len(path) <= _LONGEST_PATH and "\n" not in path and PurePosixPath(path).suffix.lower() in _IMAGE_SUFFIXES
    )
