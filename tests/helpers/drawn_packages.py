"""Archives in the layout of EmojiVQA's packages, with a few drawings of our own: no network, no picture of others."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from switchkd.pipelines.emoji_vqa.packages import PACKAGES, Package, integrity_of

# Concept → (kind, colour); each artist draws another shape.
CONCEPTS = {
    "cat": ("mammal", "red"),
    "dog": ("mammal", "blue"),
    "fox": ("mammal", "green"),
    "cow": ("mammal", "gold"),
    "pig": ("mammal", "pink"),
    "grapes": ("fruit", "purple"),
    "lemon": ("fruit", "yellow"),
    "pear": ("fruit", "lime"),
    "peach": ("fruit", "orange"),
    "axe": ("tool", "navy"),
    "hammer": ("tool", "black"),
    "wrench": ("tool", "brown"),
    "star": (None, "teal"),
    "moai": (None, "gray"),
    "soap": (None, "cyan"),
    "owl book": (None, "maroon"),
}
SHAPES = {
    "noto": '<circle cx="8" cy="8" r="6" fill="{}"/>',
    "twemoji": '<rect x="2" y="2" width="12" height="12" fill="{}"/>',
    "fluent-flat": '<path d="M8 1 L15 15 L1 15 Z" fill="{}"/>',
    "openmoji": '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<ellipse cx="8" cy="8" rx="7" ry="3" fill="{}"/></svg>',
}


def kinds():
    """Concept → its kind, as `concepts.kind_of` returns it."""
    return {name: kind for name, (kind, _) in CONCEPTS.items()}


def write_archives(folder: Path) -> tuple[Package, ...]:
    """Write the five archives; returns packages with their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {name: f"1F4{number:02X}" for number, name in enumerate(CONCEPTS)}
    codes["star"] += "-FE0F"  # which the 3D set writes without
    rows = [{"annotation": name, "hexcode": code, "skintone": "", "group": "objects"} for name, code in codes.items()]
    rows.append({"annotation": "cat", "hexcode": "E001", "skintone": "", "group": "extras-openmoji"})
    contents = {"openmoji": {"data/openmoji.json": json.dumps(rows).encode()}, "fluent-3d": {}}
    for name, (_, color) in CONCEPTS.items():
        contents["openmoji"][f"color/svg/{codes[name]}.svg"] = SHAPES["openmoji"].format(color).encode()
        contents["fluent-3d"][f"assets/{codes[name].lower().removesuffix('-fe0f')}.webp"] = _webp(color)
    for artist in ("noto", "twemoji", "fluent-flat"):
        icons = {
            name.replace(" ", "-"): {"body": SHAPES[artist].format(color)} for name, (_, color) in CONCEPTS.items()
        }
        icons["kitty"] = icons.pop("cat")
        table = {"icons": icons, "aliases": {"cat": {"parent": "kitty"}}, "width": 16, "height": 16}
        contents[artist] = {"icons.json": json.dumps(table).encode()}
    found = []
    for package in PACKAGES:
        path = folder / package.archive
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents[package.artist].items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found.append(replace(package, integrity=integrity_of(path)))
    return tuple(found)


def _webp(color: str) -> bytes:
    image, out = Image.new("RGBA", (24, 24)), io.BytesIO()
    ImageDraw.Draw(image).rectangle((4, 9, 20, 15), fill=color)
    image.save(out, "WEBP", lossless=True)
    return out.getvalue()
