"""`switchkd attend`: attention maps of teacher, baseline and student for the same questions, side by side (paper, Fig. 3)."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import ConfigError
from switchkd.pipelines.drawing import PAGES, matplotlib_ready, wrapped
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.reporting.attention import AttentionMap, AttentionProbe, overlap
from switchkd.pipelines.reporting.options import AttendOptions
from switchkd.pipelines.reporting.page import write_page
from switchkd.pipelines.run_folder import write_atomically

PAGE, PICTURE = "attend.html", "attend.png"
COLORS = "inferno"  # brightness increases with the value, also in grey and with colour blindness
LEAST_PIXELS = 384  # width of a picture in the page
VEIL = 0.65  # opacity of the map over the image


@dataclass(frozen=True)
class Panel:
    """One model's map over one image."""

    name: str
    attention: AttentionMap
    overlap: float | None  # with the teacher's map; None: no teacher, the teacher itself, or another grid

    @property
    def figures(self) -> str:
        """The share of the answer's attention that goes to the image, and the overlap with the teacher's map."""
        same = "" if self.overlap is None else f", overlap {self.overlap:.2f}"
        return f"{self.attention.share:.1%} on the image{same}"


@dataclass(frozen=True)
class Row:
    """One question."""

    image: Path
    question: str
    panels: list[Panel]


def attend(options: AttendOptions) -> list[Row]:
    """Draw the attention maps, PICTURE and PAGE in a folder, and return what they show.

    Raises:
        ConfigError: matplotlib or jinja2 is missing, or a model's image tokens form no grid. CheckpointError: no model there.
        BadSample: an image that cannot be used.
    """
    with matplotlib_ready("attend"):
        pass
    if not options.asked:
        raise ConfigError("attend needs at least one --image with its --question")
    given = {"teacher": options.teacher, "baseline": options.baseline, "student": options.model}
    models = {name: path for name, path in given.items() if path is not None}
    maps: dict[str, list[AttentionMap]] = {}
    with Progress("looking", len(models) * len(options.asked), "images") as progress:
        for name, path in models.items():  # one after the other, so that only one model is in memory
            probe = AttentionProbe(
                path,
                options.template,
                options.layers,
                options.max_new_tokens,
                options.device,
                options.dtype,
                options.trust_remote_code,
            )
            maps[name] = []
            for image, question in options.asked:
                maps[name].append(probe.map_of(image, question, options.answer))
                progress.advance(1)
    rows = [Row(image, question, _panels(maps, i)) for i, (image, question) in enumerate(options.asked)]
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / PICTURE, _draw(rows))
    layers = "all layers" if not options.layers else f"layers {', '.join(map(str, options.layers))}"
    write_page(
        options.out / PAGE,
        "attend.html",
        title="Where the models look",
        rows=[
            (
                row,
                _scale(row),
                _data_uri(_seen(row)),
                [_data_uri(_overlaid(panel, *_scale(row))) for panel in row.panels],
            )
            for row in rows
        ],
        layers=layers,
        ramp=_ramp(),
    )
    return rows


def _panels(maps: dict[str, list[AttentionMap]], number: int) -> list[Panel]:
    teacher = maps["teacher"][number].map if "teacher" in maps else None
    return [
        Panel(
            name, found[number], None if teacher is None or name == "teacher" else overlap(found[number].map, teacher)
        )
        for name, found in maps.items()
    ]


def _density(attention: AttentionMap) -> NDArray[np.float64]:
    """Return a map in multiples of an even spread, [rows, columns]; NaN without a token."""
    return attention.map * attention.map.size


def _scale(row: Row) -> tuple[float, float]:
    """Return the least and the largest density of a row's maps: the scale of all its panels, which so shows their differences.

    Equal densities give a scale that begins at 0.
    """
    least = min(float(np.nanmin(_density(panel.attention))) for panel in row.panels)
    largest = max(float(np.nanmax(_density(panel.attention))) for panel in row.panels)
    return (least if largest - least > 1e-6 else 0.0), largest


def _seen(row: Row) -> NDArray[np.float64]:
    return row.panels[-1].attention.seen


def _overlaid(panel: Panel, least: float, largest: float) -> NDArray[np.float64]:
    """Overlay a map on the processed image of its model, [H, W, 3] in 0 … 1; every pixel of a patch has its patch's colour."""
    import matplotlib

    seen, density = panel.attention.seen, (_density(panel.attention) - least) / (largest - least)
    y, x = (np.arange(size) * side // size for size, side in zip(seen.shape[:2], density.shape, strict=True))
    tinted = matplotlib.colormaps[COLORS](np.nan_to_num(density[np.ix_(y, x)]))[..., :3]
    mixed: NDArray[np.float64] = (1 - VEIL) * seen.mean(axis=2, keepdims=True) + VEIL * tinted
    return mixed


def _draw(rows: Sequence[Row]) -> bytes:
    """Draw all rows: the image, then every model's map over it; one colour bar per row."""
    with matplotlib_ready("attend") as pyplot:
        columns = 1 + max(len(row.panels) for row in rows)
        figure, grid = pyplot.subplots(
            len(rows), columns, figsize=(3 * columns + 0.5, 3.6 * len(rows)), squeeze=False, facecolor=PAGES[0]
        )
        for axes, row in zip(grid, rows, strict=True):
            axes[0].imshow(_seen(row))
            axes[0].set_title(f"{_short(row.image.name, lines=1)}\n{_short(row.question)}", fontsize=9)
            for place, panel in zip(axes[1:], row.panels, strict=True):
                place.imshow(_overlaid(panel, *_scale(row)))
                answer = _short(repr(panel.attention.answer), lines=2)
                place.set_title(f"{panel.name}\n{panel.figures}\n{answer}", fontsize=9)
            bar = figure.colorbar(
                pyplot.cm.ScalarMappable(pyplot.Normalize(*_scale(row)), COLORS), ax=list(axes), fraction=0.02
            )
            bar.set_label("times an even spread", fontsize=8)
            for place in axes:
                place.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)
        return buffer.getvalue()


def _short(text: str, width: int = 38, lines: int = 3) -> str:
    """Wrap a caption to the width of a panel, and cut it after some lines; a long word is broken."""
    return wrapped(text, width, lines)


def _ramp() -> str:
    """Return the colours of the scale from least to largest, as a CSS gradient, under the veil over white."""
    import matplotlib

    stops = [VEIL * np.array(matplotlib.colormaps[COLORS](at)[:3]) + 1 - VEIL for at in np.linspace(0, 1, 9)]
    return f"linear-gradient(to right, {', '.join(matplotlib.colors.to_hex(stop) for stop in stops)})"


def _data_uri(pixels: NDArray[Any]) -> str:
    from PIL import Image

    times = max(1, LEAST_PIXELS // pixels.shape[1])  # browsers blur small images when they scale them up
    large = (pixels * 255).round().astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
