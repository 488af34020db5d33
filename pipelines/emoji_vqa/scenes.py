"""EmojiVQA's images and questions: scenes of drawings, numbers on signs, and bar charts, each with what is asked about it.

A `SceneMaker` draws from one stream of random numbers, so that a chunk of images depends on its seed alone. Each scene returns an
image and its questions; the answer never follows from the question.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from switchkd.pipelines.emoji_vqa.concepts import is_are, with_article
from switchkd.pipelines.emoji_vqa.drawings import Drawings

COLORS = {
    "red": (214, 48, 49),
    "blue": (52, 101, 205),
    "green": (46, 160, 67),
    "yellow": (245, 205, 60),
    "purple": (142, 68, 173),
    "orange": (240, 130, 40),
    "gray": (128, 128, 128),
    "pink": (245, 150, 190),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "abcd"
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "STIXGeneralBol.ttf", "DejaVuSansMono-Bold.ttf")
NEW_FONTS = ("cmss10.ttf", "DejaVuSerif-BoldItalic.ttf")  # in the split `style` alone
UNANSWERABLE = "unanswerable"
ROWS = ("top", "middle", "bottom")
DESCRIBE = "describe the image."
HELD_OUT = 5  # one of so many combinations is kept for the split `combo`
DEGRADED_IN_TRAINING = 0.12  # share of the training images
SCENES = {"single": 3, "cards": 4, "count": 2, "sign": 2, "chart": 2}  # scene → how often
COMBINED = ("color", "where", "relation", "count", "read", "value")  # kinds of question that combine two things


class Shown(NamedTuple):
    """One thing in an image: a drawing by its concept, a digit, or a bar by its value; later ones cover earlier ones."""

    thing: str
    color: str | None  # of its card, its sign or the bar; None without
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def caption_of(shown: "Sequence[Shown]", size: int) -> str:
    """Return what an image shows, in reading order: each thing, after the colour of its card, sign or bar.

    A thing that is not alone is named after the row that it is in, at its first one: "top red cat blue dog bottom gray owl".
    """
    placed = sorted(shown, key=lambda one: (_row_of(one, size), one.box[0]))
    words: list[str] = []
    row = None
    for one in placed:
        kind, _, rest = one.thing.rpartition(" ")
        if kind == "digit":
            words += [*([] if words else [str(one.color), "sign"]), rest]
            continue
        if kind != "bar of" and len(shown) > 1 and _row_of(one, size) != row:
            row = _row_of(one, size)
            words.append(ROWS[row])
        words += [*([] if one.color is None else [one.color]), rest if kind == "bar of" else one.thing]
    return " ".join(words)


def _row_of(one: "Shown", size: int) -> int:
    """Return the row of a thing's centre, 0 … 2; bars and digits stand in one."""
    if one.thing.startswith(("digit ", "bar of ")):
        return 0
    return min(2, int(3 * (one.box[1] + one.box[3]) / 2 / size))


class Asked(NamedTuple):
    """One question about an image."""

    kind: str
    question: str
    answer: str
    unit: str = ""  # questions of one unit are right together: the rotations of a choice


@dataclass(frozen=True)
class Style:
    """What a split's images are made of."""

    artists: tuple[str, ...]
    concepts: tuple[str, ...]
    fonts: tuple[str, ...] = FONTS
    scenes: tuple[str, ...] = tuple(SCENES)
    held_out: bool = False  # asks for the combinations that other splits never show
    names: bool = True  # asks what a thing is, not only of what kind
    rotations: int = 1  # of the options of a choice that are asked
    degraded: float = 0.0  # share of the images that are darkened, blurred or noisy


def fold(*what: object) -> int:
    """Return a number that depends on the arguments alone, 0 … 2³² − 1."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:8], 16)


def is_held_out(*combination: object) -> bool:
    """Whether a combination is kept for the split `combo`."""
    return fold(*combination) % HELD_OUT == 0


def font_folder() -> Path:
    """Return matplotlib's folder of fonts, which come with every installation of it."""
    import matplotlib

    return Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf"


class SceneMaker:
    """Makes images of one split from one seed.

    Args:
        drawings: see `drawings.read_drawings`. kinds: concept → its kind or None.
        size: width and height of an image in pixels. seed: any text.
    """

    def __init__(self, drawings: Drawings, kinds: Mapping[str, str | None], style: Style, size: int, seed: str) -> None:
        self.drawings, self.kinds, self.style, self.size = drawings, kinds, style, size
        self.random = random.Random(seed)
        self.noise = np.random.default_rng(fold("noise", seed))
        self.shown: list[Shown] = []  # in the last image, in the order in which it was drawn
        self.fonts = [font_folder() / name for name in style.fonts]
        self.of_kind: dict[str | None, list[str]] = defaultdict(list)
        for concept in style.concepts:
            self.of_kind[kinds[concept]].append(concept)
        self.asked_kinds = [concept for concept in style.concepts if kinds[concept] is not None]

    def make(self) -> tuple[Image.Image, list[Asked]]:
        """Return the next image, RGB, and at least one question about it."""
        weights = [SCENES[name] for name in self.style.scenes]
        while True:
            self.shown = []
            scene = self.random.choices(self.style.scenes, weights)[0]
            image, asked = getattr(self, f"_{scene}")()
            if self.style.held_out:
                asked = [one for one in asked if one.kind in COMBINED and one.answer != UNANSWERABLE]
            if asked:
                break
        if self.style.degraded and self.random.random() < self.style.degraded:
            image = self._degrade(image)
        return image, asked

    def _allowed(self, *combination: object) -> bool:
        return is_held_out(*combination) == self.style.held_out

    def _single(self) -> tuple[Image.Image, list[Asked]]:
        """One drawing: what it is, of what kind, and which of four."""
        draw, size = self.random, self.size
        concept = draw.choice(self.style.concepts if self.style.names else self.asked_kinds)
        kind, width = self.kinds[concept], draw.randint(size // 2, int(size * 0.8))
        image = self._ground()
        center = [draw.randint(width // 2, size - width // 2) for _ in range(2)]
        self._paste(image, concept, center[0], center[1], width)
        asked = [] if kind is None else [Asked("kind", "what kind of thing is this?", kind)]
        if self.style.names:
            asked.append(
                Asked("what", f"what {is_are(concept)} {'these' if is_are(concept) == 'are' else 'this'}?", concept)
            )
            near = [other for other in self.of_kind[kind] if other != concept]
            wrong = draw.sample(near, min(3, len(near)))
            wrong += self._others(3 - len(wrong), (concept, *wrong))
            options = [*wrong, concept]
            draw.shuffle(options)
            for turn in range(self.style.rotations):
                turned = options[turn:] + options[:turn]
                listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, turned, strict=True))
                asked.append(Asked("choice", f"which is shown? {listed}", LETTERS[turned.index(concept)], "choice"))
        return image, asked

    def _cards(self) -> tuple[Image.Image, list[Asked]]:
        """Three drawings on coloured cards: colours, places, and what is there."""
        draw, size = self.random, self.size
        names, colors = self._others(3), draw.sample(sorted(COLORS), 3)
        cells = draw.sample([(column, row) for column in (0, 1) for row in (0, 1)], 3)
        image, at = self._ground(), dict(zip(names, cells, strict=True))
        for name, (column, row), color in zip(names, cells, colors, strict=True):
            x, y = (int(size * (0.26 + 0.48 * cell)) + draw.randint(-3, 3) for cell in (column, row))
            self._paste(image, name, x, y, int(size * 0.36), color)
        asked = []
        chosen = draw.randrange(3)
        if self._allowed("color", names[chosen], colors[chosen]):
            asked.append(Asked("color", f"what color is the card of the {names[chosen]}?", colors[chosen]))
        pairs = [(one, other) for one in names for other in names if one != other]
        for one, other in draw.sample(pairs, 6):
            if at[one][1] == at[other][1] and self._allowed("where", one, other):
                side = "left" if at[one][0] < at[other][0] else "right"
                asked.append(Asked("where", f"what is {side} of the {other}?", one))
                break
        for one, other in draw.sample(pairs, 6):
            if at[one][0] == at[other][0] and self._allowed("relation", one, other):
                yes = draw.random() < 0.5
                word = "above" if (at[one][1] < at[other][1]) == yes else "below"
                asked.append(Asked("relation", f"{is_are(one)} the {one} {word} the {other}?", "yes" if yes else "no"))
                break
        return image, asked + self._presence(names)

    def _presence(self, names: Sequence[str]) -> list[Asked]:
        """What is there, as POPE asks it, and a question about what is not."""
        draw = self.random
        yes, near = draw.random() < 0.5, draw.random() < 0.5
        shown = draw.choice(names)
        kin = [name for name in self.of_kind[self.kinds[shown]] if name not in names]
        near = near and self.kinds[shown] is not None and bool(kin)
        absent = draw.choice(kin) if near else self._others(1, names)[0]
        name = shown if yes else absent
        kind = "presence-adversarial" if near else "presence-random"
        asked = [Asked(kind, f"{is_are(name)} there {with_article(name)} in the image?", "yes" if yes else "no")]
        if draw.random() < 0.3:
            asked.append(Asked("color", f"what color is the card of the {absent}?", UNANSWERABLE))
        return asked

    def _count(self) -> tuple[Image.Image, list[Asked]]:
        """Up to nine drawings of two concepts: how many of one."""
        draw, size = self.random, self.size
        one, other = self._others(2)
        number = draw.randint(1, 5)
        while not self._allowed("count", one, number):
            (one,), number = self._others(1, (other,)), draw.randint(1, 5)
        more = draw.randint(0, min(3, 9 - number))
        image = self._ground()
        cells = draw.sample([(column, row) for column in range(3) for row in range(3)], number + more)
        for index, (column, row) in enumerate(cells):
            x, y = (int(size * (cell + 0.5) / 3) + draw.randint(-2, 2) for cell in (column, row))
            self._paste(image, one if index < number else other, x, y, int(size * draw.uniform(0.24, 0.31)))
        question = f"how many times {is_are(one)} the {one} shown?"
        return image, [Asked("count", question, NUMBERS[number])]

    def _sign(self) -> tuple[Image.Image, list[Asked]]:
        """A number of two or three digits on a sign."""
        draw, size = self.random, self.size
        image = self._ground()
        while True:
            digits = "".join(draw.choice("0123456789") for _ in range(draw.choice((2, 3))))
            if self._allowed("read", digits):
                break
        color, width, height = draw.choice(sorted(COLORS)), int(size * 0.78), int(size * 0.42)
        x, y = draw.randint(2, size - width - 2), draw.randint(2, size - height - 2)
        pen = ImageDraw.Draw(image)
        pen.rounded_rectangle((x, y, x + width, y + height), 6, fill=COLORS[color], outline="white", width=2)
        font = ImageFont.truetype(str(draw.choice(self.fonts)), draw.randint(int(size * 0.25), int(size * 0.33)))
        ink = (20, 20, 20) if color in ("yellow", "pink") else (255, 255, 255)
        pen.text((x + width / 2, y + height / 2), digits, font=font, fill=ink, anchor="mm")
        start, half = x + width / 2 - font.getlength(digits) / 2, font.size / 2
        for index, digit in enumerate(digits):
            left, right = (start + font.getlength(digits[:end]) for end in (index, index + 1))
            self.shown.append(
                Shown(f"digit {digit}", color, (left, y + height / 2 - half, right, y + height / 2 + half))
            )
        return image, [Asked("read", "which digits are on the sign?", " ".join(digits))]

    def _chart(self) -> tuple[Image.Image, list[Asked]]:
        """A bar chart: the highest or lowest bar, and the value of one."""
        draw, size = self.random, self.size
        number = draw.randint(3, 5)
        colors, values = draw.sample(sorted(COLORS), number), draw.sample(range(1, 10), number)
        image = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(image)
        left, bottom, unit = int(size * 0.12), int(size * 0.94), size * 0.086
        font = ImageFont.truetype(str(self.fonts[0]), max(7, size // 12))
        for mark in (3, 6, 9):
            pen.line((left, bottom - mark * unit, size, bottom - mark * unit), fill=(205, 205, 205))
            pen.text((1, bottom - mark * unit), str(mark), font=font, fill=(60, 60, 60), anchor="lm")
        width = (size - left) / number
        for index, (color, value) in enumerate(zip(colors, values, strict=True)):
            x = left + index * width
            box = (x + 2, bottom - value * unit, x + width - 2, bottom)
            pen.rectangle(box, fill=COLORS[color])
            self.shown.append(Shown(f"bar of {NUMBERS[value]}", color, box))
        pen.line((left, bottom, size, bottom), fill="black")
        pen.line((left, 2, left, bottom), fill="black")
        word, extreme = ("highest", max(values)) if draw.random() < 0.5 else ("lowest", min(values))
        asked = [Asked("chart", f"which bar is the {word}?", colors[values.index(extreme)])]
        color, value = draw.choice(list(zip(colors, values, strict=True)))
        if self._allowed("value", color, value, number):
            asked.append(Asked("value", f"what is the value of the {color} bar?", NUMBERS[value]))
        return image, asked

    def _others(self, count: int, avoid: Sequence[str] = ()) -> list[str]:
        return self.random.sample([name for name in self.style.concepts if name not in avoid], count)

    def _ground(self) -> Image.Image:
        """Return a light background: a gradient of two colours, with some noise."""
        draw, size = self.random, self.size
        one, other = (tuple(draw.randint(150, 255) for _ in range(3)) for _ in range(2))
        ramp = Image.linear_gradient("L").resize((size, size)).rotate(draw.choice((0, 90, 180, 270)))
        image = Image.composite(Image.new("RGB", (size, size), one), Image.new("RGB", (size, size), other), ramp)
        return Image.blend(image, self._grain(60), draw.uniform(0, 0.18))

    def _grain(self, sigma: float) -> Image.Image:
        values = self.noise.normal(128, sigma, (self.size, self.size)).clip(0, 255).astype(np.uint8)
        return Image.fromarray(values).convert("RGB")

    def _paste(self, image: Image.Image, concept: str, x: int, y: int, width: int, card: str | None = None) -> None:
        """Put a drawing with its centre at (x, y), mirrored at random and turned a little, on a card if it has a colour."""
        draw = self.random
        drawing = self.drawings[concept][draw.choice(self.style.artists)]
        if draw.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.rotate(draw.uniform(-12, 12), Image.Resampling.BILINEAR)
        drawing = drawing.resize((width, width), Image.Resampling.LANCZOS)
        left, top = int(x - width / 2), int(y - width / 2)
        if card is not None:
            box = (left - 3, top - 3, left + width + 3, top + width + 3)
            ImageDraw.Draw(image).rounded_rectangle(box, 5, fill=COLORS[card])
        image.paste(drawing, (left, top), drawing)
        self.shown.append(Shown(concept, card, (left, top, left + width, top + width)))

    def _degrade(self, image: Image.Image) -> Image.Image:
        draw = self.random
        how = draw.choice(("dark", "blur", "noise"))
        if how == "dark":
            return ImageEnhance.Brightness(image).enhance(draw.uniform(0.15, 0.35))
        if how == "blur":
            return image.filter(ImageFilter.GaussianBlur(draw.uniform(1.2, 2.2)))
        return Image.blend(image, self._grain(120), 0.5)
