"""All results of a run in one JSON file and one Markdown table.

`scores.json`:

    schema       1
    model        the checkpoint folder; weights: hash of its weight files; template: of the prompts
    benchmarks   a list of `Result` (results.py explains each field), in the table's order
                 a score on a sample (`--limit`) has `limited_to`, the number of units in it
    averages     avg7 and avg10: {"score": mean or null, "missing": titles of the benchmarks it lacks, "limited": of those that
                 were scored on a sample}
    baseline     null, or with --baseline:
                   run, model            the other run's folder and checkpoint
                   benchmarks            {"name", "split", "score" and "limited_to" (the baseline's),
                                         "difference" (this run minus it),
                                         "interval" (95 %, paired bootstrap), "units" (shared by both)}
                   averages              avg7 and avg10 of the baseline, as above

`scores.md` shows the same: the paper's columns, then each benchmark with split, n, interval and failures, then the
details: MME's points, POPE's metrics by part, accuracies by kind of question.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.registry import AVERAGES, BENCHMARKS, TEN
from switchkd.pipelines.evaluation.benchmarks.results import Result, read_results, read_units
from switchkd.pipelines.evaluation.intervals import paired_difference
from switchkd.pipelines.run_folder import RECORD, SCORES, write_atomically

SCHEMA = 1
TABLE = "scores.md"


def write_scoreboard(run: Path, baseline: Path | None) -> str:
    """Write `scores.json` and `scores.md` from all results in a run's folder, and return the table.

    Raises:
        DataError: `baseline` holds no results, or answered other questions.
    """
    results = _ordered(read_results(run))
    about = _about(run)
    board: dict[str, Any] = {"schema": SCHEMA, **about, "benchmarks": [asdict(result) for result in results]}
    board["averages"] = _averages(results)
    board["baseline"] = None if baseline is None else _compare(run, results, baseline)
    write_atomically(run / SCORES, json.dumps(board, indent=1))
    table = markdown(board)
    write_atomically(run / TABLE, table)
    return table


def markdown(board: dict[str, Any]) -> str:
    """Return the table of a `scores.json`."""
    columns = [benchmark.name for benchmark in TEN]
    scores = _columns(board["benchmarks"], "score")
    head = ["model", *(_title(board, benchmark.name) for benchmark in TEN), "Avg7", "Avg10"]
    baseline = board["baseline"]
    ours, other = _names(board["model"], baseline["model"] if baseline else "")
    rows = [
        [
            ours,
            *(_figure(scores.get(name)) for name in columns),
            *_average_cells(board["averages"]),
        ]
    ]
    if baseline:
        theirs, change = _columns(baseline["benchmarks"], "score"), _columns(baseline["benchmarks"], "difference")
        samples = {r["name"]: f" ({sample_label(r)})" for r in baseline["benchmarks"] if r["limited_to"] is not None}
        rows.append(
            [
                other,
                *(_figure(theirs.get(n)) + samples.get(n, "") for n in columns),
                *_average_cells(baseline["averages"]),
            ]
        )
        rows.append(["difference", *(_figure(change.get(n), "+.1f") for n in columns), "", ""])
    text = _table(head, rows)
    for name, average in board["averages"].items():
        if average["missing"]:
            text += f"\n{name.capitalize()} is left blank: {', '.join(average['missing'])} not scored.\n"
        elif average["limited"]:
            text += f"\n{name.capitalize()} is left blank: {', '.join(average['limited'])} scored on a sample only.\n"
    if any(average["score"] is not None for average in board["averages"].values()):
        text += f"\n{_caveats(board['benchmarks'])}\n"
    text += "\n" + _table(
        ["benchmark", "split", "score is", "score", "95 % interval", "n", "left out", "failed", "note"],
        [_detail_row(result) for result in board["benchmarks"]],
    )
    if baseline:
        lines = [
            [
                BENCHMARKS[r["name"]].title,
                r["split"],
                _figure(r["difference"], "+.2f"),
                _span(r["interval"], "+.2f"),
                f"{r['units']:,}",
            ]
            for r in baseline["benchmarks"]
        ]
        text += "\n" + _table(["benchmark", "split", "difference", "95 % interval, paired bootstrap", "n"], lines)
    for row in board["benchmarks"]:
        if row["details"]:
            figures = ", ".join(f"{name} {value:,.2f}" for name, value in row["details"].items())
            text += f"\n{BENCHMARKS[row['name']].title}: {figures}.\n"
    return text


def _ordered(results: Sequence[Result]) -> list[Result]:
    order = list(BENCHMARKS)
    return sorted((r for r in results if r.name in order), key=lambda r: (order.index(r.name), r.split))


def _about(run: Path) -> dict[str, str]:
    """Return the entries of a run's record about its model."""
    path = run / RECORD
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("model", "weights", "template")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{run} is no output folder of `switchkd eval` with benchmarks: {error}") from None


def _averages(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    scores = {result.name: result.score for result in results if result.score is not None}
    samples = {result.name for result in results if result.score is not None and result.limited_to is not None}
    out: dict[str, dict[str, Any]] = {}
    for average, names in AVERAGES.items():
        missing = [BENCHMARKS[name].title for name in names if name not in scores]
        limited = [BENCHMARKS[name].title for name in names if name in samples]
        mean = None if missing or limited else sum(scores[name] for name in names) / len(names)
        out[average] = {"score": mean, "missing": missing, "limited": limited}
    return out


def _compare(run: Path, results: Sequence[Result], baseline: Path) -> dict[str, Any]:
    theirs = [result for result in _ordered(read_results(baseline)) if result.score is not None]
    rows = differences(run, results, baseline, theirs)
    return {
        "run": str(baseline),
        "model": _about(baseline)["model"],
        "benchmarks": rows,
        "averages": _averages(theirs),
    }


def differences(
    run: Path, results: Sequence[Result], baseline: Path, their_results: Sequence[Result]
) -> list[dict[str, Any]]:
    """Return the entries `baseline.benchmarks` of `scores.json`, see above: a run minus a baseline, where both have a score.

    Raises:
        DataError: there is no such benchmark, or one with other questions.
    """
    theirs = {(r.name, r.split): r for r in their_results if r.score is not None}
    shared = [r for r in results if r.score is not None and (r.name, r.split) in theirs]
    if not shared:
        raise DataError(f"--baseline {baseline} shares no scored benchmark with {run}")
    rows = []
    for result in shared:
        other = theirs[result.name, result.split]
        if other.fingerprint != result.fingerprint:
            raise DataError(
                f"{result.name} ({result.split}) of {baseline} answered other questions than {run}: score both on one copy"
            )
        try:
            found = paired_difference(
                read_units(run, result), read_units(baseline, other), BENCHMARKS[result.name].headline
            )
        except ValueError as error:
            raise DataError(f"{result.name} ({result.split}) of {baseline} cannot be compared: {error}") from None
        about = {"name": result.name, "split": result.split, "score": other.score, "limited_to": other.limited_to}
        rows.append(about | found._asdict())
    return rows


def _caveats(rows: Sequence[dict[str, Any]]) -> str:
    """Return notes for readers of the averages."""
    text = "The averages take VQAv2 and VizWiz on val; published ones take their test splits."
    partial = [
        BENCHMARKS[row["name"]].title for row in rows if row["units_left_out"] and row["name"] in AVERAGES["avg10"]
    ]
    return text + (f" Some questions of {', '.join(partial)} could not be asked and are left out." if partial else "")


def _names(ours: str, theirs: str) -> tuple[str, str]:
    """Return the checkpoints' folder names, with the parent folder added if the names are equal."""
    names = [Path(path).name for path in (ours, theirs)]
    if names[0] == names[1] and ours != theirs:
        names = ["/".join(Path(path).parts[-2:]) for path in (ours, theirs)]
    return names[0], names[1]


def _columns(rows: Sequence[dict[str, Any]], field: str) -> dict[str, float]:
    return {row["name"]: row[field] for row in rows if row[field] is not None}


def _title(board: dict[str, Any], name: str) -> str:
    """Return a column's title, with the split if it differs from the paper's, and with the size of a sample."""
    row = next((row for row in board["benchmarks"] if row["name"] == name and row["score"] is not None), None)
    if row is None:
        return BENCHMARKS[name].title
    said = [row["split"]] if name in ("vqav2", "vizwiz") else []
    said += [sample_label(row)] if row["limited_to"] is not None else []
    return BENCHMARKS[name].title + (f" ({', '.join(said)})" if said else "")


def sample_label(row: dict[str, Any]) -> str:
    """Return how a score on a sample is labelled, from an entry of `benchmarks` in scores.json."""
    return f"sample of {row['limited_to']:,}"


def _average_cells(averages: dict[str, dict[str, Any]]) -> list[str]:
    return [_figure(averages[name]["score"]) for name in AVERAGES]


def _detail_row(row: dict[str, Any]) -> list[str]:
    failed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(row["failed"].items())) or "0"
    span = _span(row["interval"]) + (f" ({row['interval_method']})" if row["interval"] else "")
    counts = [f"{row['units']:,}", f"{row['units_left_out']:,}", failed]
    note = row["note"] + (f": see the submission file: {row['submission']}" if row["submission"] else "")
    return [
        BENCHMARKS[row["name"]].title,
        row["split"],
        row["metric"],
        _figure(row["score"], ".2f"),
        span,
        *counts,
        note,
    ]


def _figure(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _span(interval: Sequence[float] | None, form: str = ".2f") -> str:
    return "" if interval is None else f"{interval[0]:{form}} … {interval[1]:{form}}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
