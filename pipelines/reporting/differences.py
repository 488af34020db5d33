"""Differences of evaluations from a baseline for the report: by type of question or by benchmark, each with its count."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.registry import BENCHMARKS
from switchkd.pipelines.evaluation.benchmarks.results import read_results
from switchkd.pipelines.evaluation.benchmarks.scoreboard import differences
from switchkd.pipelines.evaluation.comparison import compare, open_baseline
from switchkd.pipelines.reporting.figures import Interval, intervals
from switchkd.pipelines.reporting.inputs import EvalRun, Inputs
from switchkd.pipelines.reporting.page import Section, Table
from switchkd.pipelines.reporting.samples import read_predictions
from switchkd.pipelines.run_folder import PREDICTIONS

EVERY = "all questions"
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A model minus a baseline on the questions of one kind that both answered."""

    kind: str  # type of question, or benchmark
    count: int
    interval: Interval  # 95 %, paired bootstrap; exact match: -1 … 1, benchmarks: points of percent
    sides: tuple[str, str]  # exact match: questions that one of the two alone answered right; benchmarks: both scores


def add_differences(section: Section, inputs: Inputs, baseline: EvalRun | None) -> None:
    """Add a table and a figure of the evaluations' differences from a baseline, over the questions that both answered.

    Args:
        baseline: what all others of its kind (exact match, benchmarks) are compared with; one that answered other questions is
            left out with a line. None: the differences that `switchkd eval --baseline` recorded.
    """
    found: dict[tuple[str, bool], dict[str, list[Difference]]] = {}
    for run in inputs.evals:
        if baseline is None:
            if (recorded := run.scores.get("baseline")) is not None:
                of_run = found.setdefault((_name_of(recorded["run"], inputs), run.on_benchmarks), {})
                of_run[run.label] = _of_benchmarks(run.scores) if run.on_benchmarks else _of_types(recorded)
        elif run is not baseline and run.on_benchmarks == baseline.on_benchmarks:
            try:
                found_here = _on_benchmarks(run, baseline) if run.on_benchmarks else _on_data(run, baseline)
            except DataError as error:
                section.missing.append(f"The differences of {run.label} from {baseline.label} are left out: {error}")
                continue
            found.setdefault((baseline.label, run.on_benchmarks), {})[run.label] = found_here
    if baseline is not None and not found:
        section.missing.append(
            f"No difference from {baseline.label}: give further evaluations by `switchkd eval` on the same questions."
        )
    for number, ((name, on_benchmarks), by_run) in enumerate(found.items()):
        _show(section, inputs, f"differences{f'-{number}' if number else ''}", name, on_benchmarks, by_run)


def _show(
    section: Section,
    inputs: Inputs,
    figure: str,
    baseline: str,
    on_benchmarks: bool,
    by_run: Mapping[str, list[Difference]],
) -> None:
    """Add the table and the figure of differences from one baseline."""
    what, form, unit = ("benchmark", ".1f", "percent") if on_benchmarks else ("question type", ".4f", "share")
    sides = ["score", f"score of {baseline}"] if on_benchmarks else ["right here alone", f"right in {baseline} alone"]
    rows = [
        [
            label,
            one.kind,
            f"{one.count:,}",
            f"{one.interval.value:+{form}}",
            f"{one.interval.low:+{form}} … {one.interval.high:+{form}}",
            *one.sides,
        ]
        for label, found in by_run.items()
        for one in found
    ]
    head = ["model", what, "questions", f"difference from {baseline}", "95 % interval", *sides]
    section.tables.append(Table(head, rows))
    section.notes.append(
        f"Differences are the model's score minus that of {baseline} over the questions that both answered; the interval is a "
        "paired bootstrap over them."
    )
    by_kind: dict[str, dict[str, Interval]] = {}
    for label, found in by_run.items():
        for one in found:
            by_kind.setdefault(f"{one.kind} ({one.count:,})", {})[label] = one.interval
    title = f"Difference from {baseline} by {what}, with 95 % intervals and the number of questions"
    section.figures.extend(intervals(figure, title, by_kind, f"difference, {unit}", inputs.series))


def _name_of(run: str, inputs: Inputs) -> str:
    """Return the label of an evaluation in the report, or the name of its folder if it was not given."""
    labels = [one.label for one in inputs.evals if one.path.resolve() == Path(run).resolve()]
    return labels[0] if labels else Path(run).name


def _on_data(run: EvalRun, baseline: EvalRun) -> list[Difference]:
    """Compare exact match. Raises DataError: another data file, or no question in common."""
    other = open_baseline(baseline.path, str(run.options.get("data_sha256")))
    lines = list(read_predictions(run.path / PREDICTIONS, "data").values())
    return _of_types(asdict(compare(lines, other)))


def _of_types(comparison: Numbers) -> list[Difference]:
    """Return the differences of a `Comparison` as data: of all questions, then of each type."""
    kinds = {EVERY: comparison["overall"], **comparison["by_type"]}
    return [
        Difference(
            kind,
            one["questions"],
            Interval(one["difference"], *one["interval"]),
            (f"{one['gained']:,}", f"{one['lost']:,}"),
        )
        for kind, one in kinds.items()
    ]


def _of_benchmarks(scores: Numbers) -> list[Difference]:
    """Return the differences that a scoreboard recorded.

    Args:
        scores: the scoreboard's `scores.json`, or its entries `benchmarks` and `baseline`.
    """
    ours = {(one["name"], one["split"]): one["score"] for one in scores["benchmarks"]}
    return [
        Difference(
            f"{BENCHMARKS[one['name']].title} ({one['split']})",
            one["units"],
            Interval(one["difference"], *one["interval"]),
            (f"{ours[one['name'], one['split']]:.1f}", f"{one['score']:.1f}"),
        )
        for one in scores["baseline"]["benchmarks"]
    ]


def _on_benchmarks(run: EvalRun, baseline: EvalRun) -> list[Difference]:
    """Compare the benchmarks that both have scored. Raises DataError: none, or one with other questions."""
    ours, theirs = read_results(run.path), read_results(baseline.path)
    rows = differences(run.path, ours, baseline.path, theirs)
    return _of_benchmarks({"benchmarks": [asdict(one) for one in ours], "baseline": {"benchmarks": rows}})
