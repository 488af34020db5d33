"""The result of one benchmark and its files.

A run's folder contains, for every requested benchmark and split, `NAME-SPLIT/` with

    predictions.jsonl   one question per line: id, question (the whole prompt text), image, reference, and either prediction or
                        failed (why it could not be used) with detail
    units.jsonl         one scored unit per line: id, values, stratum, group (scored splits only)
    result.json         the fields of `Result`
    run.yaml            split, fingerprint of questions and references
    a submission file where the split's answers are not public
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import Benchmark, Question
from switchkd.pipelines.evaluation.intervals import Unit, bootstrap, by_stratum, means_of, wilson
from switchkd.pipelines.run_folder import write_atomically

RESULT, UNITS = "result.json", "units.jsonl"


@dataclass(frozen=True)
class Result:
    """The result of one benchmark split. Scores are percent, 0 … 100."""

    name: str
    split: str
    title: str
    metric: str
    score: float | None  # None where answers are not public, or for the reason in `note`
    interval: tuple[float, float] | None  # 95 %
    interval_method: str  # wilson or bootstrap
    questions: int  # all questions, including failed ones
    units: int  # scored
    units_left_out: int  # not scored because one of their questions failed
    failed: dict[str, int]  # questions that could not be used, by reason
    details: dict[str, float]
    note: str
    submission: str | None  # path below the run's folder
    fingerprint: str  # of questions and references
    split_units: int | None = None  # of the whole split; None in results of earlier versions
    limited_to: int | None = None  # units in the sample that `--limit` asked; None: the whole split was asked


def folder_name(name: str, split: str) -> str:
    """Return the folder of a benchmark split within a run."""
    return f"{name}-{split}"


def score(
    benchmark: Benchmark,
    split: str,
    questions: Sequence[Question],
    strata: Collection[str],
    units: Sequence[Unit],
    failed: dict[str, int],
    digest: str,
) -> Result:
    """Compute a result from scored units; `strata` are those of the whole split, each of which needs a unit."""
    empty = set(strata) - {u.stratum for u in units}
    note, figure, interval = "", None, None
    if not benchmark.splits[split].scored:
        note = "answers are not public"
    elif empty:
        note = "no answer at all" if not units else f"no answer in {', '.join(sorted(empty))}"
    else:
        figure = float(benchmark.headline(means_of(by_stratum(units))))
        if benchmark.interval == "wilson":
            interval = wilson(sum(unit.values[0] for unit in units), len(units))
        else:
            interval = bootstrap(units, benchmark.headline)
    return Result(
        name=benchmark.name,
        split=split,
        title=benchmark.title,
        metric=benchmark.metric,
        score=figure,
        interval=interval,
        interval_method=benchmark.interval,
        questions=len(questions),
        units=len(units),
        units_left_out=len({q.unit_id for q in questions}) - len(units) if benchmark.splits[split].scored else 0,
        failed=failed,
        details=benchmark.details(units) if units else {},
        note=note,
        submission=None,
        fingerprint=digest,
    )


def write_result(folder: Path, result: Result, units: Sequence[Unit]) -> None:
    """Write a result and its units."""
    lines = [json.dumps(unit._asdict()) + "\n" for unit in units]
    write_atomically(folder / UNITS, "".join(lines))
    write_atomically(folder / RESULT, json.dumps(asdict(result), indent=1))


def read_results(run: Path) -> list[Result]:
    """Read every result of a run's folder. Raises DataError that names a damaged file."""
    results = []
    for path in sorted(run.glob(f"*/{RESULT}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results.append(Result(**content | {"interval": content["interval"] and tuple(content["interval"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it and score again with --score-only") from None
    return results


def read_units(run: Path, result: Result) -> list[Unit]:
    """Read the units of a result. Raises DataError that names a missing or damaged file."""
    path = run / folder_name(result.name, result.split) / UNITS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Unit(row["id"], tuple(row["values"]), row["stratum"], row["group"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error}): score that run again with --score-only") from None
