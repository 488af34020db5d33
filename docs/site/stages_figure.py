"""Draws docs/stages.svg: the two stages, the store between them, and the switch pathway.

python docs/site/stages_figure.py
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "stages.svg"
WIDTH, HEIGHT = 960, 430
TEACHER, STUDENT, STORED, TERM = "#dbe7f6", "#dff0d8", "#f3ead2", "#f7dfe0"
INK, MUTED = "#1f2933", "#52606d"


@dataclass(frozen=True)
class Box:
    """A rectangle with one or two lines of text; coordinates in pixels."""

    x: int
    y: int
    text: str
    fill: str
    width: int = 118
    height: int = 46

    @property
    def right(self) -> tuple[int, int]:
        """The middle of its right side."""
        return self.x + self.width, self.y + self.height // 2

    @property
    def left(self) -> tuple[int, int]:
        """The middle of its left side."""
        return self.x, self.y + self.height // 2

    @property
    def bottom(self) -> tuple[int, int]:
        """The middle of its lower side."""
        return self.x + self.width // 2, self.y + self.height

    def svg(self) -> str:
        """Return the box as SVG."""
        lines = self.text.split("\n")
        first = self.y + self.height // 2 + 5 - 8 * (len(lines) - 1)
        words = "".join(
            f'<text x="{self.x + self.width // 2}" y="{first + 16 * i}" text-anchor="middle" fill="{INK}">{line}</text>'
            for i, line in enumerate(lines)
        )
        return (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.fill}" '
            f'stroke="{MUTED}"/>{words}'
        )


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through points that ends in an arrow head."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def label(x: int, y: int, text: str, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    """Return a line of text beside the boxes."""
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{MUTED if weight == "normal" else INK}" font-size="{size}" '
        f'font-weight="{weight}">{text}</text>'
    )


def draw() -> str:
    """Return the figure."""
    stage_one = [
        Box(40, 60, "images,\nconversations", "#ffffff"),
        Box(200, 60, "teacher's\nvision tower", TEACHER),
        Box(360, 60, "teacher's\nprojector", TEACHER),
        Box(520, 60, "teacher's\nLLM", TEACHER),
    ]
    store = Box(700, 60, "store: hidden states,\ntop-k logits, digests", STORED, width=190)
    student = [
        Box(40, 240, "the same images,\nconversations", "#ffffff", width=130),
        Box(210, 240, "student's\nvision tower", STUDENT),
        Box(370, 240, "student's\nprojector", STUDENT),
        Box(520, 240, "student's\nLLM", STUDENT),
    ]
    switch = [Box(370, 340, "teacher's\nprojector", TEACHER), Box(520, 340, "teacher's\nLLM", TEACHER)]
    ce, align, vsd = (
        Box(760, 190, "CE", TERM, width=130, height=40),
        Box(760, 255, "Align (DBiLD)", TERM, width=130, height=40),
        Box(760, 343, "VSD (DBiLD)", TERM, width=130, height=40),
    )
    boxes = [*stage_one, store, *student, *switch, ce, align, vsd]
    lines = [
        *(arrow(a.right, b.left) for a, b in zip(stage_one, [*stage_one[1:], store], strict=True)),
        *(arrow(a.right, b.left) for a, b in pairwise(student)),
        arrow(student[1].bottom, (student[1].bottom[0], 363), switch[0].left),
        arrow(switch[0].right, switch[1].left),
        arrow(switch[1].right, vsd.left),
        arrow(student[3].right, (690, 263), (690, 210), ce.left),
        arrow((690, 263), (690, 275), align.left),
        arrow(store.right, (905, 83), (905, 275), align.right),
        arrow((905, 275), (905, 363), vsd.right),
    ]
    words = [
        label(40, 30, "Stage one, once: switchkd cache-teacher", size=16, weight="bold"),
        label(40, 190, "Stage two, for each student: switchkd train --cache", size=16, weight="bold"),
        label(
            40,
            408,
            "The switch pathway: the student's visual features through the teacher's frozen projector and LLM, live;",
        ),
        label(
            40,
            425,
            "its gradient trains the student's vision tower. The teacher's own vision tower is not loaded in stage two.",
        ),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 10}" role="img" font-family="sans-serif" '
        'font-size="13"><title>The two stages of switchkd and the switch pathway</title>'
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT + 10}" fill="#ffffff"/>'
        f"{''.join(lines)}{''.join(box.svg() for box in boxes)}{''.join(words)}</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"written: {PICTURE}")
