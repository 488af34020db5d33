"""Scores of evaluations for the report: tables, and the radar chart of the paper's Figure 1."""

from typing import Any

import numpy as np

from switchkd.pipelines.evaluation.benchmarks.scoreboard import sample_label
from switchkd.pipelines.reporting import figures
from switchkd.pipelines.reporting.differences import add_differences
from switchkd.pipelines.reporting.inputs import EvalRun, Inputs
from switchkd.pipelines.reporting.page import Section, Table

# The five competencies of the paper's Figure 1 and Table 1 → benchmarks by name.
COMPETENCIES = {
    "Perception & understanding": ("mme", "mmbench", "mmbench-cn"),
    "Cognition & reasoning": ("vqav2", "gqa", "scienceqa", "mmmu"),
    "OCR": ("textvqa",),
    "Domain-specific": ("vizwiz",),
    "Hallucination": ("pope",),
}


def scores_of(inputs: Inputs, baseline: EvalRun | None) -> Section:
    """Return tables of scores, differences from a baseline, and the radar chart of the paper's Figure 1."""
    section = Section("Scores")
    if not inputs.evals:
        section.missing.append("No evaluation was given: name a folder that `switchkd eval --output` wrote.")
        return section
    plain = [run for run in inputs.evals if not run.on_benchmarks]
    if plain:
        section.tables.append(_exact_match_table(plain))
    judged = [run for run in inputs.evals if run.on_benchmarks]
    if judged:
        section.tables.append(_benchmark_table(judged))
        section.notes.append(
            "Benchmark scores are percent with a 95 % interval; MME is percent of 2,000 perception points."
        )
    add_differences(section, inputs, baseline)
    shapes = {run.label: shape for run in judged if (shape := _competencies(run)) is not None}
    if shapes:
        title = "Five competencies, mean score in percent"
        names = [name.replace(" & ", " &\n") for name in COMPETENCIES]
        section.figures.extend(figures.radar("radar", title, names, shapes, inputs.series))
    else:
        section.missing.append(
            "The radar of five competencies (the paper's Figure 1) is left out: it needs scores on all ten benchmarks, "
            "`switchkd eval --task all`."
        )
    return section


def _exact_match_table(runs: list[EvalRun]) -> Table:
    kinds = sorted({kind for run in runs for kind in run.scores["by_type"]})
    rows = []
    for run in runs:
        by_type = [f"{run.scores['by_type'][k]:.4f}" if k in run.scores["by_type"] else "" for k in kinds]
        skipped = f"{sum(run.scores['skipped'].values()):,}"
        count = f"{run.scores['questions']:,}" + (" (a sample)" if run.scores.get("limited_to") is not None else "")
        rows.append([run.label, f"{run.scores['accuracy']:.4f}", *by_type, count, skipped])
    return Table(["model", "exact match", *kinds, "questions", "skipped"], rows)


def _benchmark_table(runs: list[EvalRun]) -> Table:
    columns = dict.fromkeys((row["title"], row["split"]) for run in runs for row in run.scores["benchmarks"])
    averages = dict.fromkeys(name for run in runs for name in run.scores["averages"])
    rows = []
    for run in runs:
        found = {(row["title"], row["split"]): row for row in run.scores["benchmarks"]}
        means = [run.scores["averages"].get(name, {}).get("score") for name in averages]
        cells = [_score_cell(found.get(column)) for column in columns]
        rows.append([run.label, *cells, *("" if mean is None else f"{mean:.1f}" for mean in means)])
    return Table(["model", *(f"{t} ({s})" for t, s in columns), *(name.capitalize() for name in averages)], rows)


def _score_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return ""
    low, high = row["interval"] or (None, None)
    sample = "" if row.get("limited_to") is None else f", {sample_label(row)}"
    return f"{row['score']:.1f}" + ("" if low is None else f" ({low:.1f} … {high:.1f})") + sample


def _competencies(run: EvalRun) -> list[float] | None:
    """Return the mean score of each competency, or None if one of the ten benchmarks has no score on its whole split."""
    whole = [row for row in run.scores["benchmarks"] if row.get("limited_to") is None]
    scores = {row["name"]: row["score"] for row in whole if row["score"] is not None}
    if any(name not in scores for names in COMPETENCIES.values() for name in names):
        return None
    return [float(np.mean([scores[name] for name in names])) for names in COMPETENCIES.values()]
