"""Draws docs/gradient.svg: the gradient of DBiLD while one logit of the teacher rises through the order and across the knee.

    python docs/site/gradient_figure.py    # needs matplotlib (extra `viz`)

A made-up row of 40 logits in float64, so that nothing is rounded. The figures of the curve are also in the picture's description,
as JSON: `tests/test_docs.py` compares them with `curve()`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from switchkd.losses import dbild_loss
from switchkd.losses.selection import leading_entries

PICTURE = Path(__file__).parents[1] / "gradient.svg"
ROWS, MOVED = 40, 9  # logits in the row, and the id whose logit rises
FROM, TO, STEPS = 2.4, 4.0, 641


@dataclass(frozen=True)
class Curve:
    """What the picture shows, each a list over the values of the moving logit."""

    teacher: list[float]  # the teacher's logit of the id
    gradient: list[float]  # of DBiLD with respect to the student's logit of the same id
    k: list[int]  # the teacher's knee
    rank: list[int]  # of the id among the teacher's logits, from 1


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of teacher and student, [ROWS] float64; the teacher's descend."""
    ranks = torch.arange(1, ROWS + 1, dtype=torch.float64)
    teacher = 9 * ranks**-0.5
    return teacher, teacher + 0.4 * torch.sin(5 * ranks)


def curve() -> Curve:
    """Compute the curve; the student's logits stay the same."""
    teacher, student = rows()
    values = torch.linspace(FROM, TO, STEPS, dtype=torch.float64)
    moving = teacher.repeat(STEPS, 1)
    moving[:, MOVED] = values
    logits = student.repeat(STEPS, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(dbild_loss(logits, moving, reduction="sum"), logits)
    _, k = leading_entries(moving)
    rank = (moving > values.unsqueeze(-1)).sum(-1) + 1
    return Curve(values.tolist(), gradient[:, MOVED].tolist(), k.tolist(), rank.tolist())


def draw(found: Curve, path: Path) -> None:
    """Draw the curve as SVG. The file depends on the curve and the version of matplotlib alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "switchkd", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.4))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        # The curve is drawn in pieces, so that no line hides a jump.
        states = list(zip(found.k, found.rank, strict=True))
        jumps = [i for i in range(1, len(states)) if states[i] != states[i - 1]]
        for begin, end in zip([0, *jumps], [*jumps, len(states)], strict=True):
            above.plot(found.teacher[begin:end], found.gradient[begin:end], color="#3949ab", linewidth=1.6)
        above.set_ylabel("gradient at the\nstudent's logit of id A")
        below.step(found.teacher, found.k, where="post", color="#c62828", label="k, the teacher's knee")
        below.step(found.teacher, found.rank, where="post", color="#555555", label="rank of id A")
        below.set_yticks(range(6, 15, 2))
        below.set_xlabel("teacher's logit of id A")
        below.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": json.dumps(asdict(found))})


if __name__ == "__main__":
    draw(curve(), PICTURE)
