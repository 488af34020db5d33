"""The table of an ablation: mean and standard deviation over seeds, as Markdown, CSV and a plot."""

import csv
import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.pipelines.ablation.cells import AXES, OPTION_AXES
from switchkd.pipelines.ablation.recipe import Recipe
from switchkd.pipelines.drawing import PAGES, TEACHER, color, matplotlib_ready, wrapped
from switchkd.pipelines.run_folder import write_atomically
from switchkd.printable import markdown_text

NONE = "–"


@dataclass(frozen=True)
class Result:
    """One finished cell, or one evaluated teacher."""

    cell: Mapping[str, Any] | None  # axis → value; None for a teacher
    name: str
    accuracy: float  # or mean score, see `measure`
    by_type: Mapping[str, float]  # or by benchmark
    questions: int
    seconds: float  # wall time of the training runs that lead to it, shared ones counted for each
    runs: list[str]
    measure: str = "accuracy"  # 0 … 1, or "mean score" of benchmarks, 0 … 100


@dataclass(frozen=True)
class Row:
    """Results that differ only in the seed."""

    labels: tuple[str, ...]  # of the axes that vary
    results: tuple[Result, ...]

    @property
    def accuracies(self) -> list[float]:
        """One result per seed."""
        return [result.accuracy for result in self.results]

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.results) > 1 else None

    def mean_of(self, kind: str) -> float | None:
        """Mean accuracy over seeds on questions of one type."""
        found = [result.by_type[kind] for result in self.results if kind in result.by_type]
        return statistics.fmean(found) if found else None


def rows_of(results: list[Result]) -> tuple[list[str], list[Row]]:
    """Group results over seeds: (the axes that vary, rows in order of appearance; teachers have no axes' values but one)."""
    cells = [result.cell for result in results if result.cell is not None]
    every = [axis for axis in (*AXES, *OPTION_AXES) if axis != "seed"]
    axes = [axis for axis in every if len({cell.get(axis) for cell in cells}) > 1] or ["student"]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.cell is None:
            labels = (result.name, *[""] * (len(axes) - 1))
        else:
            labels = tuple(_word(axis, result.cell) for axis in axes)
        groups.setdefault(labels, []).append(result)
    return axes, [Row(labels, tuple(found)) for labels, found in groups.items()]


def _word(axis: str, cell: Mapping[str, Any]) -> str:
    value = cell.get(axis)  # a result of an earlier version has no option axes
    if value is None or (axis == "switch" and cell["teacher"] is None):
        return NONE
    if axis == "switch":
        return "with" if value else "without"
    if axis in OPTION_AXES:
        return f"{value:g}"
    return str(value).upper() if axis == "scheme" else str(value)


def write_report(workdir: Path, recipe: Recipe, results: list[Result], final: bool) -> tuple[Path, ...]:
    """Write NAME.md, NAME.csv (a line per row), NAME-cells.csv (a line per cell) and, if `final`, NAME.png; returns the paths."""
    axes, rows = rows_of(results)
    kinds = list(dict.fromkeys(kind for result in results for kind in result.by_type))  # benchmarks in their order
    measure = results[0].measure if results else "accuracy"
    if measure == "accuracy":
        kinds.sort()
    paths = [workdir / f"{recipe.name}{ending}" for ending in (".md", ".csv", "-cells.csv")]
    missing = len(recipe.cells) - sum(result.cell is not None for result in results)
    text = f"# {recipe.title}\n\n{markdown(axes, rows, kinds)}\n"
    text += f"\n{missing} of {len(recipe.cells)} cells are still missing.\n" if missing else ""
    text += f"\n{recipe.notes.strip()}\n" if recipe.notes else ""
    write_atomically(paths[0], text)
    column = measure.replace(" ", "_")
    summary: list[list[Any]] = [
        [*axes, f"{column}_mean", f"{column}_sd", "seeds", *kinds, "questions", "train_seconds"]
    ]
    summary += [
        [*row.labels, row.mean, row.spread, len(row.results), *map(row.mean_of, kinds), _questions(row), _seconds(row)]
        for row in rows
    ]
    write_atomically(paths[1], _csv(summary))
    varied = [axis for axis in OPTION_AXES if any(r.cell is not None and r.cell.get(axis) is not None for r in results)]
    columns = [*AXES, *varied]
    cells: list[list[Any]] = [[*columns, column, *kinds, "questions", "train_seconds", "run"]]
    for result in results:
        of_teacher = [result.name, *[""] * (len(columns) - 1)]
        values = of_teacher if result.cell is None else [result.cell.get(axis) for axis in columns]
        scores = [result.accuracy, *(result.by_type.get(kind) for kind in kinds)]
        cells.append([*values, *scores, result.questions, result.seconds, (result.runs or [""])[-1]])
    write_atomically(paths[2], _csv(cells))
    if final:
        paths.append(workdir / f"{recipe.name}.png")
        draw(paths[-1], recipe.title, axes, rows)
    return tuple(paths)


def markdown(axes: list[str], rows: list[Row], kinds: list[str]) -> str:
    """Return the table: mean ± sample standard deviation over seeds, each seed, then means by question type or benchmark."""
    measure = rows[0].results[0].measure if rows else "accuracy"
    form = ".4f" if measure == "accuracy" else ".2f"
    head = [*axes, measure, "each seed", *map(markdown_text, kinds), "questions", "training time"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(axes) + " ---: |" * (len(head) - len(axes))]
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:{form}}"
        means = [row.mean_of(kind) for kind in kinds]
        cells = [
            *map(markdown_text, row.labels),
            f"{row.mean:{form}}{spread}",
            ", ".join(f"{value:{form}}" for value in row.accuracies),
        ]
        cells += [NONE if mean is None else f"{mean:{form}}" for mean in means]
        cells += [f"{_questions(row):,}", f"{_seconds(row):,.0f} s" if _seconds(row) else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(axes: list[str], row: Row) -> str:
    """Name a row in the plot: "student small, teacher large"."""
    if row.results[0].cell is None:
        return row.labels[0]
    spoken = {"student": "student {}", "teacher": "teacher {}", "switch": "{} switch", "lr": "rate {}"}
    spoken |= {"align_weight": "λ1 {}", "vsd_weight": "λ2 {}", "steps": "{} steps"}
    pairs = zip(axes, row.labels, strict=True)
    return ", ".join(spoken.get(axis, "{}").format(word) for axis, word in pairs if word != NONE)


def _questions(row: Row) -> int:
    return row.results[0].questions


def _seconds(row: Row) -> float:
    return statistics.fmean(result.seconds for result in row.results)


def _csv(lines: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def draw(path: Path, title: str, axis_names: list[str], rows: list[Row]) -> None:
    """Draw each row's mean, its spread, and a dot per seed; no bars, since the scale does not begin at 0.

    The scale fits the students. A teacher that would take more than half of it is not drawn: an arrow at the edge names its value.
    """
    with matplotlib_ready("the table's plot") as pyplot:
        measure = rows[0].results[0].measure
        form = ".3f" if measure == "accuracy" else ".1f"
        low, high = limits(rows)
        text = wrapped(title, 100)
        height = 1.4 + 0.45 * len(rows) + 0.17 * text.count("\n")
        figure, axes = pyplot.subplots(figsize=(8, height))
        for place, row in enumerate(rows):
            look = color(TEACHER if row.results[0].cell is None else 0)
            if not low <= row.mean <= high:
                aside = row.mean > high
                at = ((0.985 if aside else 0.015), place)
                words = f"{row.mean:{form}} →" if aside else f"← {row.mean:{form}}"
                sides: dict[str, Any] = {"ha": "right" if aside else "left", "va": "center", "color": look}
                axes.text(*at, words, transform=axes.get_yaxis_transform(), fontsize=8, **sides)
                continue
            axes.errorbar(row.mean, place, xerr=row.spread or 0.0, fmt="|", color=look, markersize=16, capsize=3)
            axes.plot(row.accuracies, [place] * len(row.results), "o", color=look, markersize=4, alpha=0.7)
        axes.set(xlim=(low, high), xlabel=f"{measure}; line: mean, whisker: standard deviation, dot: a seed")
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(rows)), [textwrap.fill(_name(axis_names, row), 40) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        figure.suptitle(text)
        figure.savefig(path, dpi=150, facecolor=PAGES[0])
        pyplot.close(figure)


def limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the limits of the plot's scale: those of the students, and of a teacher unless it would take more than half."""
    students = [end for row in rows if row.results[0].cell is not None for end in _ends(row)]
    teachers = [end for row in rows if row.results[0].cell is None for end in _ends(row)]
    low, high = min(students or teachers), max(students or teachers)
    lowest, highest = min([low, *teachers]), max([high, *teachers])
    if highest - lowest <= 2 * (high - low):
        low, high = lowest, highest
    margin = 0.08 * (high - low) or 0.02 * (1.0 if rows[0].results[0].measure == "accuracy" else 100.0)
    return low - margin, high + margin


def _ends(row: Row) -> list[float]:
    """Return every value that a row's drawing reaches."""
    spread = row.spread or 0.0
    return [*row.accuracies, row.mean - spread, row.mean + spread]
