"""`switchkd data emoji-vqa`: build EmojiVQA, a suite of small images and questions that asks for seeing.

Drawings of some 360 things by five artists are put into scenes, beside signs with numbers and bar charts. Kinds of questions
follow the benchmarks of the paper. The splits differ from the training images in one way each: `iid` and `val` in none, `style` in
artists and fonts, `combo` in combinations of what is known, `concept` in things that were never shown, `degraded` in the
quality of the image. The drawings are not shipped: they come from pinned packages, see `packages.py`.
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from switchkd.errors import ConfigError
from switchkd.pipelines.cores import workers_alone
from switchkd.pipelines.emoji_vqa.blind import blind_scores, macro
from switchkd.pipelines.emoji_vqa.concepts import kind_of
from switchkd.pipelines.emoji_vqa.drawings import KNOWN_ARTISTS, NEW_ARTISTS, Drawings, read_drawings
from switchkd.pipelines.emoji_vqa.options import IMAGES, SEED, EmojiVQAOptions
from switchkd.pipelines.emoji_vqa.packages import PACKAGES, Package, fetch
from switchkd.pipelines.emoji_vqa.scenes import (
    DEGRADED_IN_TRAINING,
    DESCRIBE,
    NEW_FONTS,
    SceneMaker,
    Style,
    caption_of,
    fold,
)
from switchkd.pipelines.preflight.processes import in_order
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import write_atomically

CAPTION, CAPTIONS, CONVERSATIONS = "caption", "captions.json", "conversations.json"
MARKER = "<image>\n"
Rows = list[dict[str, Any]]
REPORT = "report.json"  # written last: a folder with it is complete
GREY = "grey.png"
CHUNK_IMAGES = 100  # drawn from one seed
NEW_CONCEPTS = 6  # one of so many concepts with a kind is kept for the split `concept`
QUALITY = 90  # of JPEG
# Digests of the suite with default options; images also depend on the versions of the packages that draw.
PUBLISHED = {
    "questions": "9f86f171d903f2122b47fa69fba76bea8c38f0c29ee35943309409142a05f113",
    "images": "3c010a6a8980fec66555ab14f1490223288b0e18c6f12d6149791d482f68ef29",
}
DRAWN_WITH = ("pillow", "resvg-py", "matplotlib", "numpy")


@dataclass(frozen=True)
class Built:
    """A suite on disk, as its report tells."""

    folder: Path
    report: dict[str, Any]

    @property
    def as_published(self) -> dict[str, bool]:
        """Whether questions and images are, byte for byte, those of the published suite."""
        return {name: self.report["sha256"][name] == digest for name, digest in PUBLISHED.items()}


def build(options: EmojiVQAOptions, packages: Sequence[Package] = PACKAGES) -> Built:
    """Build the suite; a folder that is complete is left as it is.

    Files: `SPLIT.json` (LLaVA-style rows, with the kind as `question_type`), `captions.json` (what each training image shows, for
    pre-training), `conversations.json` (a row for each training image: its questions, then its caption), `images/`,
    `grey/SPLIT.json` (the same questions, every image grey), `report.json` (counts, blind scores, digests, versions), licences.

    Args:
        packages: where the drawings come from; those that are pinned.

    Raises:
        ConfigError: the folder holds something else, or a package that is needed is missing.
        DataError, RunError: see `packages.fetch`.
    """
    settings = {"size": options.size, "share": options.share, "seed": options.seed}
    if (options.out / REPORT).is_file():
        report = json.loads((options.out / REPORT).read_text())
        if report["settings"] != settings:
            raise ConfigError(f"{options.out} was built with {report['settings']}, now {settings}: pass another --out")
        if missing := [name for name in (CAPTIONS, CONVERSATIONS) if not (options.out / name).is_file()]:
            raise ConfigError(
                f"{options.out} has no {missing[0]}: an earlier version built it; remove it or pass another --out"
            )
        return Built(options.out, report)
    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty and holds no {REPORT}: pass another --out")
    kinds = kind_of()
    unfinished = options.out.with_name(f".{options.out.name}.unfinished")
    archives = fetch(options.packages or options.out.with_name("packages"), packages)
    drawings = read_drawings(archives, kinds, max(96, options.size))
    shutil.rmtree(unfinished, ignore_errors=True)
    rows, captions = _draw(unfinished, options, drawings, kinds)
    report = _write(unfinished, rows, captions, kinds, packages) | {"settings": settings}
    write_atomically(unfinished / REPORT, json.dumps(report, indent=1), durable=True)
    if options.out.exists():
        options.out.rmdir()
    unfinished.rename(options.out)
    return Built(options.out, report)


def styles(kinds: Mapping[str, str | None]) -> dict[str, Style]:
    """Return split → what its images are made of.

    Args:
        kinds: concept → its kind or None.
    """
    new = tuple(name for name in sorted(kinds) if kinds[name] is not None and fold("concept", name) % NEW_CONCEPTS == 0)
    known = tuple(name for name in sorted(kinds) if name not in new)
    plain = Style(KNOWN_ARTISTS, known, rotations=4)
    return {
        "train": replace(plain, rotations=1, degraded=DEGRADED_IN_TRAINING),
        "val": plain,
        "iid": plain,
        "style": replace(plain, artists=NEW_ARTISTS, fonts=NEW_FONTS),
        "combo": replace(plain, held_out=True, scenes=("cards", "count", "sign", "chart")),
        "concept": replace(plain, concepts=new, scenes=("single",), names=False),
        "degraded": replace(plain, degraded=1.0),
    }


def conversations(questions: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]]) -> Rows:
    """Return a row for each captioned image: its questions in an order drawn from its name, then its caption.

    An image is read once for all its questions. The caption is last, since the answers before it would follow from its text.

    Args:
        questions, captions: LLaVA-style rows with one turn each; every question's image has a caption.
    """
    asked: dict[str, list[dict[str, str]]] = {row["image"]: [] for row in captions}
    for row in questions:
        asked[row["image"]].append(row["conversations"])
    out = []
    for row in captions:
        name = row["image"]
        random.Random(name).shuffle(asked[name])
        turns = [turn for pair in (*asked[name], row["conversations"]) for turn in pair]
        later = [turn | {"value": turn["value"].removeprefix(MARKER)} for turn in turns[1:]]
        out.append({"id": name, "image": name, "conversations": [turns[0], *later]})
    return out


def _row(image: str, name: str | int, kind: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": MARKER + question}, {"from": "gpt", "value": answer}]
    return {"id": f"{image}/{name}", "image": image, "question_type": kind, "conversations": turns}


@dataclass(frozen=True)
class _Chunks:
    """Draws a chunk of a split: (split, first image, how many) → the rows of its questions, and captions in `train`."""

    folder: Path
    drawings: Drawings
    kinds: Mapping[str, str | None]
    styles: Mapping[str, Style]
    size: int
    seed: int

    def __call__(self, chunk: tuple[str, int, int]) -> tuple[Rows, Rows]:
        split, start, count = chunk
        seed = f"{self.seed}/{split}/{start}"
        maker = SceneMaker(self.drawings, self.kinds, self.styles[split], self.size, seed)
        rows, captions = [], []
        for number in range(start, start + count):
            image, asked = maker.make()
            name = f"{split}/{number:05d}.jpg"
            image.save(self.folder / "images" / name, quality=QUALITY)
            for index, one in enumerate(asked):
                row = _row(name, index, one.kind, one.question, one.answer)
                rows.append(row | ({"unit": f"{name}/{one.unit}"} if one.unit else {}))
            if split == "train":
                captions.append(_row(name, CAPTION, CAPTION, DESCRIBE, caption_of(maker.shown, self.size)))
        return rows, captions


def _draw(
    folder: Path, options: EmojiVQAOptions, drawings: Drawings, kinds: Mapping[str, str | None]
) -> tuple[dict[str, Rows], Rows]:
    """Draw all images below `folder`, and return the rows of every split, and the captions of the training images."""
    work = _Chunks(folder, drawings, kinds, styles(kinds), options.size, options.seed)
    counts = {split: max(1, round(count * options.share)) for split, count in IMAGES.items()}
    chunks = [
        (split, start, min(CHUNK_IMAGES, count - start))
        for split, count in counts.items()
        for start in range(0, count, CHUNK_IMAGES)
    ]
    rows: dict[str, Rows] = {split: [] for split in counts}
    captions: Rows = []
    for split in counts:
        (folder / "images" / split).mkdir(parents=True)
    workers = workers_alone() if options.workers is None else options.workers
    with Progress("drawing", sum(counts.values()), "images") as progress:
        for (split, _, count), (asked, shown) in zip(chunks, in_order(work, chunks, workers), strict=True):
            rows[split] += asked
            captions += shown
            progress.advance(count)
    return rows, captions


def _write(
    folder: Path,
    rows: Mapping[str, Rows],
    captions: Rows,
    kinds: Mapping[str, str | None],
    packages: Sequence[Package],
) -> dict[str, Any]:
    """Write data files, the grey ones and the licences; return the report."""
    Image.new("RGB", (32, 32), (128, 128, 128)).save(folder / "images" / GREY)
    (folder / "grey").mkdir()
    questions, images = hashlib.sha256(), hashlib.sha256()
    splits: dict[str, Any] = {}
    write_atomically(folder / CAPTIONS, json.dumps(captions))
    write_atomically(folder / CONVERSATIONS, json.dumps(conversations(rows["train"], captions)))
    for split, found in rows.items():
        content = json.dumps(found)
        questions.update(content.encode())
        write_atomically(folder / f"{split}.json", content)
        write_atomically(folder / f"grey/{split}.json", json.dumps([row | {"image": GREY} for row in found]))
        for name in dict.fromkeys(row["image"] for row in found):
            images.update((folder / "images" / name).read_bytes())
        blind = {} if split == "train" else blind_scores(rows["train"], found, kinds)
        splits[split] = {
            "images": len({row["image"] for row in found}),
            "questions": len(found),
            "kinds": dict(sorted(Counter(row["question_type"] for row in found).items())),
        } | ({"blind": blind, "blind_macro": macro(blind)} if blind else {})
    write_atomically(folder / "LICENCES.md", licences(packages))
    return {
        "splits": splits,
        "concepts": {split: len(style.concepts) for split, style in styles(kinds).items()},
        "answers": len({row["conversations"][1]["value"] for found in rows.values() for row in found}),
        "sha256": {"questions": questions.hexdigest(), "images": images.hexdigest()},
        "versions": {name: version(name) for name in DRAWN_WITH},
    }


def licences(packages: Sequence[Package] = PACKAGES) -> str:
    """Return the licences of the drawings, as Markdown."""
    lines = [
        "# Where the drawings come from",
        "",
        "| artist | package | licence | holder |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {p.artist} | {p.name}@{p.version} (npm) | {p.licence} | {p.holder} |" for p in packages]
    lines += [
        "",
        "The images were made from these drawings on this machine. Those of all splits but `style` are under the licences of "
        "noto, twemoji and fluent-flat; those of `style` under the licences of openmoji (share alike) and fluent-3d. Letters and "
        "digits are set in the fonts that matplotlib comes with (DejaVu, STIX, Computer Modern).",
        "",
    ]
    return "\n".join(lines)


def lines_of(built: Built) -> list[str]:
    """Return the report as lines of text."""
    report, default = built.report, {"size": 96, "share": 1.0, "seed": SEED}
    out = [f"{'split':<10}{'images':>8}{'questions':>11}  blind (macro average over kinds)"]
    for split, found in report["splits"].items():
        blind = f"{found['blind_macro']:.3f}" if "blind_macro" in found else ""
        out.append(f"{split:<10}{found['images']:>8,}{found['questions']:>11,}  {blind}".rstrip())
    if report["settings"] == default:
        other = [name for name, same in built.as_published.items() if not same]
        if other:
            used = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
            out.append(f"warning: {' and '.join(other)} differ from those of the published suite; drawn with {used}")
        else:
            out.append("questions and images are those of the published suite, byte for byte")
    return out
