"""Plots of a run: parts of the loss, also on held-out samples, exact match, learning rate, positions per second."""

import logging
from pathlib import Path
from typing import Any

PLOT = "training.png"
COLORS = ("#222222", "#4477aa", "#cc6677", "#117733", "#ddaa33", "#aa4499")
OF_DATA = ("loss", "loss_ce")  # drawn together; the other terms have an axis of their own
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
    curves = {name: [entry.get(name, float("nan")) for entry in logged] for name in names}
    shown = {name: values for name, values in curves.items() if any(values)}
    # Distances to the teacher are often a hundredth of the cross entropy: on its axis they would be a line at 0.
    distances = [name for name in shown if name not in OF_DATA]
    titles = {"Loss": [name for name in shown if name in OF_DATA]} | (
        {"Distance to the teacher": distances} if distances else {}
    )
    evaluated = [entry for entry in history if "eval_loss_ce" in entry]
    answered = [entry for entry in evaluated if "eval_exact_match" in entry]
    columns = len(titles) + 2 + bool(answered)
    figure, panels = pyplot.subplots(1, columns, figsize=(13 * columns / 3, 3.8), layout="constrained")
    of_losses, (rates, speeds, *of_answers) = panels[: len(titles)], panels[len(titles) :]
    for axes, (title, named) in zip(of_losses, titles.items(), strict=True):
        for name in named:
            color = COLORS[names.index(name) % len(COLORS)]
            axes.plot(steps, shown[name], color=color, label=name.removeprefix("loss_"))
            found = [entry for entry in evaluated if f"eval_{name}" in entry]
            if found:
                values = [entry[f"eval_{name}"] for entry in found]
                label = f"{name.removeprefix('loss_')}, held out"
                axes.plot([entry["step"] for entry in found], values, "o--", ms=3, color=color, label=label)
        axes.set(title=title, xlabel="step", ylabel="nats per position")
        axes.legend(frameon=False)
    rates.plot(steps, [entry["learning_rate"] for entry in logged], color=COLORS[1])
    rates.set(title="Learning rate", xlabel="step")
    speeds.plot(steps, [entry.get("positions_per_second", float("nan")) for entry in logged], color=COLORS[3])
    speeds.set(title="Speed", xlabel="step", ylabel="positions per second", ylim=(0, None))
    for axes in of_answers:
        values = [entry["eval_exact_match"] for entry in answered]
        axes.plot([entry["step"] for entry in answered], values, "o--", ms=3, color=COLORS[2])
        axes.set(title="Exact match, held out", xlabel="step", ylabel="share of the answers", ylim=(0, 1))
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 1.5
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / PLOT
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
