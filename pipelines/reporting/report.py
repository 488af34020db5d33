"""`switchkd report`: the results of runs, evaluations and stores as one self-contained HTML file, and its figures as PNG.

Runs, evaluations and stores are recognised by their files (inputs.py). A section without data is left out, with a line that
explains how to obtain it. Text may come from data files and models, so the page escapes all of it, and its content security
policy forbids scripts altogether.
"""

from dataclasses import dataclass
from pathlib import Path

from switchkd.counting import counted
from switchkd.pipelines.drawing import TEACHER, matplotlib_ready
from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.inputs import Inputs, find_inputs, named
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.page import Section, Table, write_page
from switchkd.pipelines.reporting.samples import choose_samples
from switchkd.pipelines.reporting.scores import scores_of
from switchkd.pipelines.reporting.store_plots import store_statistics
from switchkd.pipelines.reporting.student_knees import add_student_knees
from switchkd.pipelines.reporting.training_curves import training_section
from switchkd.stores.info import describe

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """The files that were written."""

    page: Path
    pictures: list[Path]
    missing: list[str]


def report(options: ReportOptions) -> Report:
    """Write a report into a folder, PAGE and its PNGs; an earlier report in the folder is replaced.

    Raises:
        ConfigError: matplotlib or jinja2 is missing, or no input has the name that an option gives.
        DataError, StoreError: nothing to report on, or something damaged.
    """
    with matplotlib_ready("report"):
        pass
    inputs = find_inputs(options.runs)
    baseline = None
    if options.baseline is not None:
        evals = [(run.label, run) for run in inputs.evals]
        baseline = named(options.baseline, evals, "--baseline", "evaluation")
    if options.knees_store is not None:
        named(options.knees_store, inputs.stores, "--knees-store", "store")
    sections = [
        training_section(inputs),
        _store(inputs, options),
        scores_of(inputs, baseline),
        _samples(inputs, options),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [figure.write_png(options.out) for section in sections for figure in section.figures]
    made_of = [str(run.path) for runs in (inputs.trains, inputs.evals) for run in runs]
    made_of += [str(store.path) for _, store in inputs.stores]
    write_page(
        options.out / PAGE,
        "report.html",
        title="Switch-KD report",
        sections=sections,
        made_of=list(dict.fromkeys(made_of)),
    )
    return Report(options.out / PAGE, pictures, [line for section in sections for line in section.missing])


def _size(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


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
        section.figures.append(
            figures.histogram(f"knees{end}", title, {"teacher": found.knees}, "k", {"teacher": TEACHER})
        )
        if manifest.has_topk and manifest.top_k < manifest.vocab_rows:
            title = f"Probability outside the top {manifest.top_k}, {label}"
            mass = {"teacher": found.tail_masses}
            section.figures.append(
                figures.histogram(f"tail{end}", title, mass, "log10 of the mass", {"teacher": TEACHER})
            )
        else:
            section.missing.append(f"{label} cuts no tail off: its payload holds every logit.")
        title = f"Size of the parts, {label}"
        section.figures.append(figures.bars(f"parts{end}", title, found.parts, found.part_mb, "part", "MB"))
    head = ["store", "payload", "samples", "positions", "size", "bytes / position", "parts"]
    section.tables.append(Table(head, rows))
    add_student_knees(section, inputs, options)
    return section


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
        f"{len(chosen.samples)} of {counted(chosen.shared, 'question')}, evenly spaced over the {chosen.differing:,} "
        "on which the answers "
        "differ, then over the others."
    )
    return Section(section.title, notes=section.notes, chosen=chosen)
