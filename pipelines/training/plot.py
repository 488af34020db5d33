"""Plots of a run: parts of the loss, learning rate, positions per second."""

import logging
from pathlib import Path
from typing import Any

PLOT = "training.png"
COLORS = ("#222222", "#4477aa", "#cc6677", "#117733", "#ddaa33", "#aa4499")
log = logging.getLogger(__name__)


def plot_run(history: list[dict[str, Any]], folder: Path) -> Path | None:
    """Plot the log of a run into `folder`; returns None, and logs one line, if matplotlib is missing or the log is empty."""
    logged = [entry for entry in history if "loss_ce" in entry]
    try:
        import matplotlib
    except ImportError:
        log.info("no plot of the run: pip install 'switchkd[viz]' draws one")
        return None
    if not logged:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = [entry["step"] for entry in logged]
    names = [name for name in logged[-1] if name == "loss" or name.startswith("loss_")]
    figure, (losses, rates, speeds) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for number, name in enumerate(names):
        values = [entry.get(name, float("nan")) for entry in logged]
        if any(values):
            losses.plot(steps, values, color=COLORS[number % len(COLORS)], label=name.removeprefix("loss_"))
    losses.set(title="Loss", xlabel="step", ylabel="nats per position")
    losses.legend(frameon=False)
    rates.plot(steps, [entry["learning_rate"] for entry in logged], color=COLORS[1])
    rates.set(title="Learning rate", xlabel="step")
    speeds.plot(steps, [entry.get("positions_per_second", float("nan")) for entry in logged], color=COLORS[3])
    speeds.set(title="Speed", xlabel="step", ylabel="positions per second", ylim=(0, None))
    for axes in (losses, rates, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / PLOT
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
