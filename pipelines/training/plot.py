"""Plots of a run: parts of the loss, also on held-out samples, exact match, visual advantage, learning rate, speed."""

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from switchkd.pipelines.drawing import PAGES, TEACHER, color, matplotlib_ready, show_differences, whole_numbers, wrapped
from switchkd.pipelines.training.options import TrainOptions

PLOT = "training.png"
OF_DATA = ("loss", "loss_ce", "loss_switch_ce")  # drawn together; the other terms have an axis of their own
COLUMNS = 3
PANEL = (4.4, 3.5)  # inches
TITLE_CHARACTERS = 52  # of a line of the figure's title, per column
log = logging.getLogger(__name__)

Entries = Sequence[Mapping[str, Any]]


def plot_run(history: list[dict[str, Any]], folder: Path, title: str = "") -> Path | None:
    """Plot the log of a run into `folder`; returns None, and logs one line, if matplotlib is missing or the log is empty.

    A term's curve on held-out samples has the term's colour, dashed and with a point for every evaluation; no two other curves
    of the figure have the same colour.
    """
    logged = [entry for entry in history if "loss_ce" in entry]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.info("no plot of the run: pip install 'switchkd[viz]' draws one")
        return None
    if not logged:
        return None
    evaluated = [entry for entry in history if "eval_loss_ce" in entry]
    panels = _panels(logged, evaluated)
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    with matplotlib_ready("the plot of a run") as pyplot:
        text = wrapped(title, TITLE_CHARACTERS * columns)
        height = PANEL[1] * rows + 0.2 * (text.count("\n") + bool(text))
        figure, grid = pyplot.subplots(rows, columns, figsize=(PANEL[0] * columns, height), squeeze=False)
        series = count()
        for axes, (title_of_panel, unit, keys) in zip(grid.flat, panels, strict=False):
            _draw(axes, keys, logged, evaluated, series)
            axes.set(title=title_of_panel, xlabel="step", ylabel=unit)
            whole_numbers(axes.xaxis)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        if text:
            figure.suptitle(text)
        path = folder / PLOT
        figure.savefig(path, dpi=150, facecolor=PAGES[0])
        pyplot.close(figure)
    return path


def title_of(options: TrainOptions, payload: str | None, mixture: Mapping[str, Any] | None) -> str:
    """Return the title of a run's plot: its folder, objective, the teacher's payload, LoRA and mixture.

    Args:
        payload: of the store that it learns from; None without a store. mixture: entry → what is recorded of it.
    """
    words = [f"{options.objective}{' with the switch pathway' if options.switch else ''}"]
    if payload is not None:
        words.append(f"payload {payload}")
    elif options.objective != "sft" and options.teacher_mode == "live":
        words.append("live teacher")
    if (lora := options.as_lora(options.as_parts())) is not None:
        words.append(f"LoRA of rank {lora.rank} in {' and '.join(sorted(lora.parts))}")
    if mixture is not None:
        words.append(f"mixture of {' + '.join(mixture)}")
    return f"{options.output.name}: {', '.join(words)}"


def _panels(logged: Entries, evaluated: Entries) -> list[tuple[str, str, list[str]]]:
    """Return (title, unit, entries that are drawn) of each panel."""
    terms = [name for name in logged[-1] if name == "loss" or name.startswith("loss_")]
    terms = [name for name in terms if any(entry.get(name) for entry in logged)]
    # Distances to the teacher are often a hundredth of the cross entropy: on its axis they would be a line at 0.
    distances = [name for name in terms if name not in OF_DATA]
    panels = [("Loss", "nats per position", [name for name in terms if name in OF_DATA])]
    if distances:
        panels.append(("Distance to the teacher", "nats per position", distances))
    if any("eval_exact_match" in entry for entry in evaluated):
        panels.append(("Exact match, held out", "share of the answers", ["exact_match"]))
    if any("eval_visual_advantage" in entry for entry in evaluated):
        panels.append(("Visual advantage, held out", "nats per sample", ["visual_advantage"]))
    panels.append(("Learning rate", "", ["learning_rate"]))
    panels.append(("Speed", "positions per second", ["positions_per_second"]))
    return panels


def _draw(axes: Any, keys: Sequence[str], logged: Entries, evaluated: Entries, series: "count[int]") -> None:
    """Draw entries of a history by step, with those of the evaluations; `series` gives each its colour."""
    drawn: list[float] = []
    for key in keys:
        look = color(TEACHER if key == "loss" else next(series))
        word = key.removeprefix("loss_").replace("_", " ")
        for entries, name, style, label in (
            (logged, key, {}, word),
            (evaluated, f"eval_{key}", {"linestyle": "--", "marker": "o", "ms": 3}, f"{word}, held out"),
        ):
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                alone: dict[str, Any] = {"marker": "o"} if len(points) == 1 else {}
                axes.plot(steps, values, color=look, label=label, **{**alone, **style})
                drawn += values
    show_differences(axes, drawn)
    if len(axes.lines) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
