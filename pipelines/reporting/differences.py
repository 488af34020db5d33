"""Differences of evaluations from a baseline for the report: by type of question or by benchmark, each with its count."""

from collections.abc import Sequence
from dataclasses import dataclass

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import ALL, Unit
from switchkd.pipelines.evaluation.benchmarks.intervals import paired_difference
from switchkd.pipelines.evaluation.benchmarks.registry import BENCHMARKS
from switchkd.pipelines.evaluation.benchmarks.results import read_results, read_units
from switchkd.pipelines.reporting.figures import Interval, intervals
from switchkd.pipelines.reporting.inputs import EvalRun, Inputs
from switchkd.pipelines.reporting.page import Section, Table
from switchkd.pipelines.reporting.samples import read_predictions
from switchkd.pipelines.run_folder import PREDICTIONS

EVERY = "all questions"


@dataclass(frozen=True)
class _Difference:
    """One row of the table: a model minus the baseline on questions that both answered."""

    kind: str  # type of question, or benchmark
    count: int
    ours: float
    theirs: float
    interval: Interval  # of ours - theirs, 95 %, paired bootstrap


def add_differences(section: Section, inputs: Inputs, baseline: EvalRun) -> None:
    """Add a table and a figure of every evaluation's differences from the baseline, over the questions that both answered.

    Evaluations of the other kind (exact match, benchmarks) are no part of it; one that answered other questions is left out with
    a line.
    """
    others = [run for run in inputs.evals if run is not baseline and run.on_benchmarks == baseline.on_benchmarks]
    found: dict[str, list[_Difference]] = {}
    for run in others:
        try:
            found[run.label] = _on_benchmarks(run, baseline) if run.on_benchmarks else _on_data(run, baseline)
        except DataError as error:
            section.missing.append(f"The differences of {run.label} from {baseline.label} are left out: {error}")
    if not found:
        section.missing.append(
            f"No difference from {baseline.label}: give further evaluations by `switchkd eval` on the same questions."
        )
        return
    what = "benchmark" if baseline.on_benchmarks else "question type"
    form, unit = (".1f", "percent") if baseline.on_benchmarks else (".4f", "share of the answers")
    head = ["model", what, "questions", "score", baseline.label, "difference", "95 % interval"]
    rows = [
        [
            label,
            one.kind,
            f"{one.count:,}",
            f"{one.ours:{form}}",
            f"{one.theirs:{form}}",
            f"{one.interval.value:+{form}}",
            f"{one.interval.low:+{form}} … {one.interval.high:+{form}}",
        ]
        for label, differences in found.items()
        for one in differences
    ]
    section.tables.append(Table(head, rows))
    section.notes.append(
        f"Differences are the model's score minus that of {baseline.label} over the questions that both answered; the interval is "
        "a paired bootstrap over them."
    )
    by_kind: dict[str, dict[str, Interval]] = {}
    for label, differences in found.items():
        for one in differences:
            by_kind.setdefault(f"{one.kind} ({one.count:,})", {})[label] = one.interval
    title = f"Difference from {baseline.label} by {what}, with 95 % intervals and the number of questions"
    section.figures.extend(intervals("differences", title, by_kind, f"difference, {unit}", inputs.series))


def _on_data(run: EvalRun, baseline: EvalRun) -> list[_Difference]:
    """Compare exact match: all questions, then each type. Raises DataError: another data file, or no question in common."""
    if run.options.get("data_sha256") != baseline.options.get("data_sha256"):
        raise DataError(f"it answered {run.options.get('data')}, the baseline {baseline.options.get('data')}")
    ours, theirs = ({unit.id: unit for unit in _units(one)} for one in (run, baseline))
    shared = [key for key in ours if key in theirs]
    kinds = sorted({ours[key].group for key in shared} - {""})
    found = []
    for kind in ("", *kinds):
        keys = [key for key in shared if not kind or ours[key].group == kind]
        pair = [ours[key] for key in keys], [theirs[key] for key in keys]
        found.append(_difference(kind or EVERY, *pair))
    return found


def _units(run: EvalRun) -> list[Unit]:
    """Return the questions of an exact match evaluation: value 1 or 0, and the type of question as the group."""
    lines = read_predictions(run.path / PREDICTIONS, "data")
    return [
        Unit(f"{row}/{turn}", (float(line["correct"]),), ALL, line.get("question_type") or "")
        for (row, turn), line in lines.items()
        if "correct" in line
    ]


def _difference(kind: str, ours: Sequence[Unit], theirs: Sequence[Unit]) -> _Difference:
    try:
        found = paired_difference(ours, theirs, lambda means: means[ALL][..., 0])
    except ValueError as error:
        raise DataError(str(error)) from None
    scores = [sum(unit.values[0] for unit in units) / len(units) for units in (ours, theirs)]
    return _Difference(kind, found.units, *scores, Interval(found.difference, *found.interval))


def _on_benchmarks(run: EvalRun, baseline: EvalRun) -> list[_Difference]:
    """Compare the benchmarks that both have scored. Raises DataError: none, or one with other questions."""
    theirs = {(one.name, one.split): one for one in read_results(baseline.path) if one.score is not None}
    found = []
    for result in read_results(run.path):
        other = theirs.get((result.name, result.split))
        if result.score is None or other is None or other.score is None:
            continue
        if other.fingerprint != result.fingerprint:
            raise DataError(f"{result.title} ({result.split}) has other questions than the baseline's")
        units = read_units(run.path, result), read_units(baseline.path, other)
        try:
            one = paired_difference(*units, BENCHMARKS[result.name].headline)
        except ValueError as error:
            raise DataError(f"{result.title} ({result.split}): {error}") from None
        name, interval = f"{result.title} ({result.split})", Interval(one.difference, *one.interval)
        found.append(_Difference(name, one.units, result.score, other.score, interval))
    if not found:
        raise DataError("both have scored no benchmark")
    return found
