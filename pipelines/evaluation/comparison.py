"""Two models on the same questions of a data file: differences of exact match, over all questions and by their type."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.generation import parse_lines
from switchkd.pipelines.evaluation.intervals import ALL, Unit, paired_difference
from switchkd.pipelines.run_folder import PREDICTIONS, RECORD

Line = dict[str, Any]  # a line of predictions.jsonl


@dataclass(frozen=True)
class Change:
    """This model's share of right answers minus the other's."""

    difference: float  # -1 … 1
    interval: tuple[float, float]  # 95 %, a percentile bootstrap that draws the same questions for both
    questions: int  # answered by both
    gained: int  # questions that this model alone answers right
    lost: int  # questions that the other alone answers right


@dataclass(frozen=True)
class Comparison:
    """Differences from another evaluation."""

    run: str  # its folder
    model: str
    overall: Change
    by_type: dict[str, Change]


@dataclass(frozen=True)
class Baseline:
    """Another model's evaluation on the same data file."""

    run: Path
    model: str
    lines: dict[tuple[Any, ...], Line]  # its answers, by row and turn


def open_baseline(run: Path, data_sha256: str, asked: Collection[tuple[Any, ...]] | None = None) -> Baseline:
    """Open the output folder of another evaluation, whose files are not changed, since it may be going on.

    Args:
        data_sha256: of the data file. asked: (row, turn) of the questions to compare; None if they are known to be answered.

    Raises:
        DataError: it is no such folder, its data file is another one, or it has answered nothing of what is asked.
    """
    try:
        record = yaml.safe_load((run / RECORD).read_text(encoding="utf-8"))
        model, answered = str(record["model"]), record["data_sha256"]
        text = (run / PREDICTIONS).read_text(encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"--baseline {run} is no output folder of `switchkd eval` with --data: {error}") from None
    if answered != data_sha256:
        raise DataError(
            f"--baseline {run} answered the questions of another data file: evaluate both models on one --data"
        )
    lines = {key: line for key, line in parse_lines(text, "row", "turn")[0].items() if "correct" in line}
    if asked is not None and not any(key in lines for key in asked):
        raise _nothing_shared(run)
    return Baseline(run, model, lines)


def compare(lines: Sequence[Line], other: Baseline) -> Comparison:
    """Compare the answers of this model with another's, over the questions that both have answered.

    Raises:
        DataError: there is no such question.
    """
    theirs = other.lines
    shared = [line for line in lines if "correct" in line and (line["row"], line["turn"]) in theirs]
    if not shared:
        raise _nothing_shared(other.run)
    pairs = [(line["question_type"], line["correct"], theirs[line["row"], line["turn"]]["correct"]) for line in shared]
    kinds = sorted({kind for kind, _, _ in pairs if kind})
    by_type = {kind: _change([pair for pair in pairs if pair[0] == kind]) for kind in kinds}
    return Comparison(str(other.run), other.model, _change(pairs), by_type)


def _nothing_shared(run: Path) -> DataError:
    return DataError(
        f"the baseline {run} has answered none of the questions that this model is asked: run it to its end, with the same --limit"
    )


def _change(pairs: Sequence[tuple[Any, bool, bool]]) -> Change:
    ours, theirs = ([Unit(str(number), (float(pair[side]),)) for number, pair in enumerate(pairs)] for side in (1, 2))
    found = paired_difference(ours, theirs, lambda means: means[ALL][..., 0])
    gained = sum(right and not other for _, right, other in pairs)
    lost = sum(other and not right for _, right, other in pairs)
    return Change(found.difference, found.interval, found.units, gained, lost)
