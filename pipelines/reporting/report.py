"""`switchkd report`: the results of runs, evaluations and stores as one self-contained HTML file, and its figures as PNG.

Runs, evaluations and stores are recognised by their files (inputs.py). A section without data is left out, with a line that
explains how to obtain it. Text may come from data files and models, so the page escapes all of it, and its content security
policy forbids scripts altogether.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchkd.errors import InputError
from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.figures import Figure
from switchkd.pipelines.reporting.inputs import Inputs, TrainRun, find_inputs
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.page import Section, Table, write_page
from switchkd.pipelines.reporting.samples import choose_samples
from switchkd.pipelines.reporting.scores import scores_of
from switchkd.pipelines.reporting.store_plots import store_statistics
from switchkd.pipelines.reporting.student_knees import knees_beside
from switchkd.stores.info import describe

PAGE = "report.html"
LOSSES = {"loss_ce": "CE", "loss_align": "Align", "loss_vsd": "VSD"}  # a baseline's objective may have other losses
LOGGED = "`switchkd train` logs it at every `--log-every`"
# Further entries of a history → title, unit, how to obtain it.
CURVES = {
    "learning_rate": ("Learning rate", "learning rate", LOGGED),
    "positions_per_second": ("Speed", "positions / s", LOGGED),
    "wait_share": ("Time spent waiting for data", "share of the time", LOGGED),
    "grad_norm": ("Gradient norm", "norm before clipping", LOGGED),
    "vsd_gradient_norm": ("Gradient of VSD in the vision features", "norm", f"train with `--switch`; {LOGGED}"),
}
# Metrics of held-out samples → title, unit; left out without a word where no run has one.
EVALUATED = {
    "eval_loss_ce": ("CE on held-out samples, nats per position", "nats per position"),
    "eval_loss_align": ("Align on held-out samples, nats per position", "nats per position"),
    "eval_loss_vsd": ("VSD on held-out samples, nats per position", "nats per position"),
    "eval_exact_match": ("Exact match on held-out samples", "share of the answers"),
}
TEACHER = {"teacher": len(figures.SERIES) - 1}  # a stored teacher has the same colour in all figures


@dataclass(frozen=True)
class Report:
    """The files that were written."""

    page: Path
    pictures: list[Path]
    missing: list[str]


def report(options: ReportOptions) -> Report:
    """Write a report into a folder, PAGE and its PNGs; an earlier report in the folder is replaced.

    Raises:
        ConfigError: matplotlib or jinja2 is missing. DataError, StoreError: nothing to report on, or something damaged.
    """
    with figures.matplotlib_ready("report"):
        pass
    inputs = find_inputs(options.runs)
    sections = [_training(inputs), _store(inputs, options), scores_of(inputs), _samples(inputs, options)]
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [figure.write_png(options.out) for section in sections for figure in section.figures]
    made_of = [str(run.path) for runs in (inputs.trains, inputs.evals) for run in runs]
    made_of += [str(store.path) for _, store in inputs.stores]
    write_page(options.out / PAGE, "report.html", title="Switch-KD report", sections=sections, made_of=made_of)
    return Report(options.out / PAGE, pictures, [line for section in sections for line in section.missing])


def _size(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _training(inputs: Inputs) -> Section:
    """Losses, learning rate and speed of the training runs."""
    section = Section("Training")
    if not inputs.trains:
        section.missing.append("No training run was given: name a folder that `switchkd train --output` wrote.")
        return section
    section.tables.append(_train_table(inputs.trains))
    if any("mixture" in run.options for run in inputs.trains):
        section.tables.append(_mixture_table(inputs.trains))
    logged = {key for run in inputs.trains for entry in run.history for key in entry if key.startswith("loss_")}
    for key, word in (LOSSES | {key: key.removeprefix("loss_") for key in sorted(logged - LOSSES.keys())}).items():
        runs = [run for run in inputs.trains if any(entry.get(key) for entry in run.history)]
        if runs:
            title = f"{word}, nats per position"
            section.figures.append(_curve(inputs, runs, key, f"loss-{word.lower()}", title, "nats per position"))
        else:
            section.missing.append(
                f"No run has {word}: train with a teacher to have Align, with `--switch` to have VSD."
            )
    for key, (title, unit, remedy) in CURVES.items():
        runs = [run for run in inputs.trains if any(key in entry for entry in run.history)]
        if runs:
            section.figures.append(_curve(inputs, runs, key, key.replace("_", "-"), title, unit))
        else:
            section.missing.append(f"No run has “{title}”: {remedy}.")
    for key, (title, unit) in EVALUATED.items():
        runs = [run for run in inputs.trains if any(key in entry for entry in run.evaluations)]
        if runs:
            section.figures.append(_curve(inputs, runs, key, key.replace("_", "-"), title, unit))
    if not any(run.evaluations for run in inputs.trains):
        section.missing.append("No run was evaluated on held-out samples while it trained: train with `--eval-data`.")
    for number, run in enumerate(inputs.trains):
        entries = [entry for entry in run.history if "knee_student_mean" in entry]
        if entries:
            steps = [entry["step"] for entry in entries]
            curves = {
                who: (steps, [entry[f"knee_{key}_mean"] for entry in entries])
                for who, key in ((run.label, "student"), ("teacher", "teacher"))
            }
            title = f"Mean knee of {run.label} and its teacher, by step"
            section.figures.append(
                figures.lines(f"knees-by-step-{number}", title, curves, "step", "k", inputs.series | TEACHER)
            )
    return section


def _curve(inputs: Inputs, runs: list[TrainRun], key: str, name: str, title: str, unit: str) -> Figure:
    curves = {}
    for run in runs:
        entries = [entry for entry in [*run.history, *run.evaluations] if key in entry]
        curves[run.label] = ([entry["step"] for entry in entries], [entry[key] for entry in entries])
    return figures.lines(name, title, curves, "step", unit, inputs.series)


def _train_table(runs: list[TrainRun]) -> Table:
    head = ["run", "objective", "teacher", "teacher's signal", "steps", "samples", "skipped", "CE", "Align", "VSD"]
    rows = []
    for run in runs:
        options, last = run.options, run.history[-1] if run.history else {}
        objective = f"{options.get('objective')}{' + switch' if options.get('switch') else ''}"
        summary = run.summary or {}
        steps = f"{summary['steps']:,}" if summary else f"{last.get('step', 0):,}, not finished"
        losses = [f"{last[key]:.4f}" if last.get(key) else "" for key in LOSSES]
        skipped = f"{sum(summary['skipped'].values()):,}" if summary else ""
        samples = f"{summary['samples']:,}" if summary else ""
        teacher = "" if options.get("teacher") is None else f"{options['teacher']} ({options.get('teacher_mode')})"
        signal = options.get("teacher_signal") or ""
        rows.append([run.label, objective, teacher, signal, steps, samples, skipped, *losses])
    return Table(head, rows)


def _mixture_table(runs: list[TrainRun]) -> Table:
    """The data files of runs that were trained on a mixture, and how many samples of each an epoch has."""
    head = ["run", "entry", "data file", "samples an epoch", "usable", "rows", "weight or cap", "template", "store"]
    rows = []
    for run in runs:
        for name, about in run.options.get("mixture", {}).items():
            counts = [f"{about[key]:,}" for key in ("samples_per_epoch", "usable", "rows")]
            said = [str(about.get(key, "")) for key in ("share", "template", "store")]
            rows.append([run.label, name, about["data"], *counts, *said])
    return Table(head, rows)


def _store(inputs: Inputs, options: ReportOptions) -> Section:
    """Knees, tail and bytes of the stores."""
    section = Section("Teacher store")
    if not inputs.stores:
        section.missing.append("No store was given: name a folder that `switchkd cache-teacher --out` wrote.")
        return section
    rows = []
    for number, (label, store) in enumerate(inputs.stores):
        found, manifest, about = store_statistics(store), store.manifest, describe(store.path)
        end = f"-{number}" if number else ""
        rows.append(
            [
                label,
                manifest.describe_all(),
                f"{about.samples:,} of {manifest.samples:,}",
                f"{about.positions:,}",
                _size(about.store_bytes),
                f"{about.bytes_per_position:,.1f}",
                f"{about.parts} of {manifest.part_count}",
            ]
        )
        if not about.positions:
            section.missing.append(f"{label} has no position yet: run cache-teacher again.")
            continue
        title = f"Knee of the teacher, {label}"
        section.figures.append(figures.histogram(f"knees{end}", title, {"teacher": found.knees}, "k", TEACHER))
        if manifest.has_topk and manifest.top_k < manifest.vocab_rows:
            title = f"Probability outside the top {manifest.top_k}, {label}"
            mass = {"teacher": found.tail_masses}
            section.figures.append(figures.histogram(f"tail{end}", title, mass, "log10 of the mass", TEACHER))
        else:
            section.missing.append(f"{label} cuts no tail off: its payload holds every logit.")
        title = f"Size of the parts, {label}"
        section.figures.append(figures.bars(f"parts{end}", title, found.parts, found.part_mb, "part", "MB"))
    head = ["store", "payload", "samples", "positions", "size", "bytes / position", "parts"]
    section.tables.append(Table(head, rows))
    _student_knees(section, inputs, options)
    return section


def _student_knees(section: Section, inputs: Inputs, options: ReportOptions) -> None:
    finished = [run for run in inputs.trains if run.summary is not None]
    if not options.knees or len(inputs.stores) != 1 or not finished:
        section.missing.append(
            "The knees of students are left out: give one store, finished runs that learned from it, and `--knees N`, the number "
            "of samples to run them on."
        )
        return
    for number, run in enumerate(finished):
        try:
            student, teacher = knees_beside(run, inputs.stores[0][1], options.knees, options.device)
        except InputError as error:  # a run whose student cannot be run again must not end the report
            section.missing.append(f"The knees of {run.label} are left out: {error}")
            continue
        title = f"Knees of {run.label} and its teacher"
        groups = {run.label: student, "teacher": teacher}
        section.figures.append(
            figures.histogram(f"knees-student-{number}", title, groups, "k", inputs.series | TEACHER)
        )
        section.notes.append(
            f"{title}: the same {len(student):,} positions, of at most {options.knees} random samples; medians "
            f"{np.median(student):,.0f} and {np.median(teacher):,.0f}."
        )


def _samples(inputs: Inputs, options: ReportOptions) -> Section:
    section = Section("Samples side by side")
    chosen = choose_samples(inputs.evals, options.samples)
    if not chosen.samples:
        section.missing.append(
            "No question was answered by every evaluation: give the folders of `switchkd eval` for teacher, student and baseline "
            "on the same data."
        )
        return section
    section.notes.append(
        f"{len(chosen.samples)} of {chosen.shared:,} questions, evenly spaced over the {chosen.differing:,} on which the answers "
        "differ, then over the others."
    )
    return Section(section.title, notes=section.notes, chosen=chosen)
