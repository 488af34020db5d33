"""The drawings of the concepts, by five artists, read from the packages' archives and rendered as RGBA images of one size."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from switchkd.errors import ConfigError, DataError

KNOWN_ARTISTS = ("noto", "twemoji", "fluent-flat")  # of the training images
NEW_ARTISTS = ("openmoji", "fluent-3d")  # seen in the split `style` alone
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 {width} {height}">{body}</svg>'
)

Drawings = Mapping[str, Mapping[str, Image.Image]]
"""Concept → artist → RGBA image, square."""


def read_drawings(archives: Mapping[str, Path], concepts: Iterable[str], size: int) -> Drawings:
    """Render every concept as each artist drew it.

    Args:
        archives: artist → archive, see `packages.fetch`. size: width and height in pixels.

    Raises:
        ConfigError: a package that draws is not installed.
        DataError: an archive has no drawing of a concept.
    """
    render = _renderer(size)
    wanted = sorted(concepts)
    codes = _codes(archives["openmoji"])
    found: dict[str, dict[str, Image.Image]] = {concept: {} for concept in wanted}
    for artist in KNOWN_ARTISTS:
        with tarfile.open(archives[artist]) as archive:
            icons = json.loads(_member(archive, "package/icons.json", archives[artist]))
        for concept in wanted:
            found[concept][artist] = render(_icon(icons, concept, archives[artist]))
    for artist, pattern in (("openmoji", "package/color/svg/{}.svg"), ("fluent-3d", "package/assets/{}.webp")):
        files = _files(archives[artist], pattern)
        for concept in wanted:
            if concept not in codes:
                raise DataError(f"{archives['openmoji']} lists no emoji with the annotation {concept!r}")
            content = _of_code(files, codes[concept], pattern, archives[artist])
            found[concept][artist] = render(content.decode()) if pattern.endswith(".svg") else _resized(content, size)
    return found


def require_renderer() -> None:
    """Raise ConfigError if the packages that draw are not installed."""
    if missing := [name for name in ("resvg_py", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"EmojiVQA is drawn with {missing[0]}: pip install 'switchkd[demo]'")


def _renderer(size: int) -> Callable[[str], Image.Image]:
    require_renderer()
    import resvg_py

    def render(svg: str) -> Image.Image:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
        return Image.open(io.BytesIO(png)).convert("RGBA")

    return render


def _codes(archive: Path) -> dict[str, str]:
    """Return annotation → code points of every emoji, as OpenMoji's table has them ("1F34E", "2708-FE0F")."""
    with tarfile.open(archive) as opened:
        rows = json.loads(_member(opened, "package/data/openmoji.json", archive))
    standard = [row for row in rows if not row["skintone"] and not row["group"].startswith("extras")]
    return {row["annotation"].lower(): row["hexcode"] for row in standard}


def _icon(icons: Mapping[str, Any], concept: str, archive: Path) -> str:
    """Return the SVG of a concept in a set of Iconify."""
    name = concept.replace(" ", "-")
    if name not in icons["icons"]:
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        raise DataError(f"{archive} has no drawing of {concept!r}")
    size = {side: icon.get(side, icons.get(side, 16)) for side in ("width", "height")}
    return _SVG.format(body=icon["body"], **size)


def _files(path: Path, pattern: str) -> dict[str, bytes]:
    """Return name → content of an archive's files of one kind, in one pass: a compressed archive cannot go back."""
    folder, ending = pattern.split("{}")
    with tarfile.open(path, "r|gz") as archive:
        members = (member for member in archive if member.name.startswith(folder) and member.name.endswith(ending))
        return {member.name: file.read() for member in members if (file := archive.extractfile(member)) is not None}


def _of_code(files: Mapping[str, bytes], code: str, pattern: str, archive: Path) -> bytes:
    """Return an emoji's file; sets differ in case and in the variation selector FE0F."""
    short = code.replace("-FE0F", "")
    for name in (code, code.lower(), short, short.lower()):
        if pattern.format(name) in files:
            return files[pattern.format(name)]
    raise DataError(f"{archive} has no {pattern.format(code)}")


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{path} has no {name}")
    return member.read()


def _resized(content: bytes, size: int) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
