"""The training section of the report: tables of settings and results, and curves by step."""

from typing import Any

from switchkd.pipelines.drawing import TEACHER
from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.figures import Figure
from switchkd.pipelines.reporting.inputs import ITS_TEACHER, Inputs, TrainRun
from switchkd.pipelines.reporting.page import Section, Table
from switchkd.pipelines.reporting.run_settings import mixture_table, settings_of, settings_table

LOSSES = {"loss_ce": "CE", "loss_align": "Align", "loss_vsd": "VSD"}  # a baseline's objective may have other losses
LOGGED = "`switchkd train` logs it at every `--log-every`"
# Further entries of a history → title, unit, how to obtain it.
CURVES = {
    "learning_rate": ("Learning rate", "learning rate", LOGGED),
    "positions_per_second": ("Speed", "positions / s", LOGGED),
    "wait_share": ("Time spent waiting for data", "share of the time", LOGGED),
    "grad_norm": ("Gradient norm", "norm before clipping", LOGGED),
    "vsd_gradient_norm": (
        "Gradient of the switch pathway in the vision features",
        "norm",
        f"train with `--switch`; {LOGGED}",
    ),
}
NATS = "nats per position"
EXACT_MATCH = "eval_exact_match"
ADVANTAGE = "eval_visual_advantage"


def training_section(inputs: Inputs) -> Section:
    """Return settings, results and curves of the training runs; each curve on training samples is followed by its held-out one."""
    section = Section("Training")
    if not inputs.trains:
        section.missing.append("No training run was given: name a folder that `switchkd train --output` wrote.")
        return section
    terms = _terms(inputs.trains)
    section.tables.append(_results_table(inputs.trains, terms))
    section.tables.append(settings_table(inputs.trains, inputs.stores))
    if any("mixture" in run.options for run in inputs.trains):
        section.tables.append(mixture_table(inputs.trains))
    section.details.extend(map(settings_of, inputs.trains))
    for key, word in terms.items():
        drawn = _curve(inputs, key, f"loss-{word.lower()}", f"{word}, {NATS}", NATS)
        if not drawn:
            section.missing.append(
                f"No run has {word}: train with a teacher to have Align, with `--switch` to have VSD."
            )
        section.figures.extend(drawn)
        title = f"{word} on held-out samples, {NATS}"
        section.figures.extend(_curve(inputs, f"eval_{key}", f"eval-loss-{word.lower()}", title, NATS))
    title = "Exact match on held-out samples"
    section.figures.extend(_curve(inputs, EXACT_MATCH, "eval-exact-match", title, "share of the answers"))
    title = "The student's visual advantage on held-out samples"
    section.figures.extend(_curve(inputs, ADVANTAGE, "eval-visual-advantage", title, "nats per sample"))
    if not any(run.evaluations for run in inputs.trains):
        section.missing.append("No run was evaluated on held-out samples while it trained: train with `--eval-data`.")
    for key, (title, unit, remedy) in CURVES.items():
        drawn = _curve(inputs, key, key.replace("_", "-"), title, unit)
        if not drawn:
            section.missing.append(f"No run has “{title}”: {remedy}.")
        section.figures.extend(drawn)
    for number, run in enumerate(inputs.trains):
        section.figures.extend(_knees_by_step(inputs, run, number))
    return section


def _terms(runs: list[TrainRun]) -> dict[str, str]:
    """Return the terms of the loss: those of Switch-KD, then others that a run has, entry → name."""
    logged = {key for run in runs for entry in run.history for key in entry if key.startswith("loss_")}
    return LOSSES | {key: key.removeprefix("loss_") for key in sorted(logged - LOSSES.keys())}


def _curve(inputs: Inputs, key: str, name: str, title: str, unit: str) -> list[Figure]:
    """Draw one entry of the runs' histories by step; nothing if no run has it, or only zeros where a term is switched off."""
    curves = {}
    for run in inputs.trains:
        entries = [entry for entry in [*run.history, *run.evaluations] if key in entry]
        off = key.startswith("loss_") and not any(entry[key] for entry in entries)
        if entries and not off:
            curves[run.label] = ([entry["step"] for entry in entries], [entry[key] for entry in entries])
    return figures.lines(name, title, curves, "step", unit, inputs.series) if curves else []


def _knees_by_step(inputs: Inputs, run: TrainRun, number: int) -> list[Figure]:
    """Draw the mean knees of a run and its teacher."""
    entries = [entry for entry in run.history if "knee_student_mean" in entry]
    if not entries:
        return []
    steps = [entry["step"] for entry in entries]
    curves = {
        label: (steps, [entry[f"knee_{key}_mean"] for entry in entries])
        for label, key in ((run.label, "student"), (ITS_TEACHER, "teacher"))
    }
    title = f"Mean knee of {run.label} and its teacher, by step"
    return figures.lines(f"knees-by-step-{number}", title, curves, "step", "k", inputs.series | {ITS_TEACHER: TEACHER})


def _results_table(runs: list[TrainRun], terms: dict[str, str]) -> Table:
    """Return steps, samples and the last losses of each run; those on held-out samples, and the best student that was kept."""
    logged = {key: word for key, word in terms.items() if any(_last(run.history, key) for run in runs)}
    held_out = {f"eval_{key}": f"{word}, held out" for key, word in terms.items()}
    held_out = (
        (held_out | {EXACT_MATCH: "exact match, held out", ADVANTAGE: "visual advantage, held out"})
        if any(run.evaluations for run in runs)
        else {}
    )
    held_out = {key: word for key, word in held_out.items() if any(_last(run.evaluations, key) for run in runs)}
    kept = any((run.summary or {}).get("best") for run in runs)
    rows = []
    for run in runs:
        summary, last = run.summary or {}, run.history[-1] if run.history else {}
        steps = f"{summary['steps']:,}" if summary else f"{last.get('step', 0):,}, not finished"
        skipped = f"{sum(summary['skipped'].values()):,}" if summary else ""
        samples = f"{summary['samples']:,}" if summary else ""
        cells = [steps, samples, skipped, *(_last(run.history, key) for key in logged)]
        cells += [_last(run.evaluations, key) for key in held_out]
        rows.append([run.label, *cells, *([_best(summary)] if kept else [])])
    head = ["run", "steps", "samples", "skipped", *logged.values(), *held_out.values()]
    return Table([*head, *(["best kept"] if kept else [])], rows)


def _last(entries: list[dict[str, Any]], key: str) -> str:
    """Return the last value of an entry as text; "" if there is none, or 0 of a term that is switched off."""
    value = next((entry[key] for entry in reversed(entries) if key in entry), None)
    return "" if value is None or (value == 0 and key in LOSSES) else f"{value:.4f}"


def _best(summary: dict[str, Any]) -> str:
    best = summary.get("best")
    return "" if best is None else f"{best['metric']} {best['value']:.4f}, step {best['step']:,}"
