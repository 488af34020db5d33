"""The interface of a benchmark: questions about images, and a rule that computes a score from the answers.

A *question* is one prompt. A *unit* is what the official rule counts: usually one question, for MME the two questions of an
image, for MMBench all rotations of one question's options. A unit is scored only if all of its questions were answered.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchkd.data.images import read_image_bytes
from switchkd.errors import DataError
from switchkd.pipelines.evaluation.intervals import ALL, Means, Unit

# The instruction at the end of each question in the LLaVA-1.5 evaluation protocol.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One prompt of a benchmark."""

    id: str  # unique within the split
    text: str  # the complete user turn, without an image marker
    image: str  # where the image is, for readers: a path, or FILE#ROW
    load: Callable[[], bytes] = field(repr=False, compare=False)  # the image file's bytes; raises BadSample
    reference: Any = None  # the reference of the rule, as JSON data; None where answers are not public
    unit: str = ""  # "" means that the question is its own unit
    stratum: str = ALL  # means are taken within a stratum
    group: str = ""  # a kind of question that the details report separately

    @property
    def unit_id(self) -> str:
        """Name of the unit that the question belongs to."""
        return self.unit or self.id


class Answer(NamedTuple):
    """One answer of a model, with its reference."""

    reference: Any
    prediction: str


@dataclass(frozen=True)
class Split:
    """One split: the files (`*` for any characters) and folders (ending in "/") it needs below the benchmark's folder."""

    files: tuple[str, ...]
    scored: bool = True  # False: its answers are not public, so the run ends with a submission file
    # Of those that LLaVA's folder playground/data/eval has elsewhere: where, below that folder. A .jsonl holds LLaVA's own rows.
    llava: Mapping[str, str] = field(default_factory=dict)


def percent(means: Means) -> NDArray[np.float64]:
    """Return 100 × the mean of each unit's first value."""
    return 100 * means[ALL][..., 0]


def by_group(units: Sequence[Unit]) -> dict[str, float]:
    """Return 100 × the mean of the first value within each named group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for unit in units:
        groups[unit.group].append(100 * unit.values[0])
    return {name: float(np.mean(values)) for name, values in sorted(groups.items()) if name}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; a plain record of functions.

    Attributes:
        name: as in `--task`. title: its column in the table. folder: its folder below `--benchmarks`.
        metric: a description of the score. home: where to get the data. source: paper and official script of the rule.
        splits: by name; the first is the default.
        read: (files as `layouts.find_files` returns them, split) → questions.
        judge: the answers of one unit, in the order of its questions → its values.
        headline: means by stratum → score, 0 … 100. details: units → further metrics, 0 … 100 unless the name says otherwise.
        interval: "wilson" where the score is a share of right units, else "bootstrap".
        submit: (questions, predictions by id, files, output folder) → the submission file in the official format.
    """

    name: str
    title: str
    folder: str
    metric: str
    home: str
    source: str
    splits: Mapping[str, Split]
    read: Callable[[Mapping[str, Path], str], list[Question]]
    judge: Callable[[Sequence[Answer]], tuple[float, ...]]
    headline: Callable[[Means], NDArray[np.float64]] = percent
    details: Callable[[Sequence[Unit]], dict[str, float]] = by_group
    interval: Literal["wilson", "bootstrap"] = "wilson"
    submit: Callable[[Sequence[Question], Mapping[str, str], Mapping[str, Path], Path], Path] | None = None


def units_of(benchmark: Benchmark, questions: Iterable[Question], predictions: Mapping[str, str]) -> list[Unit]:
    """Score every unit all of whose questions have a prediction; the others are left out."""
    members: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        members[question.unit_id].append(question)
    units = []
    for name, asked in members.items():
        if all(question.id in predictions for question in asked):
            values = benchmark.judge([Answer(question.reference, predictions[question.id]) for question in asked])
            units.append(Unit(name, values, asked[0].stratum, asked[0].group))
    return units


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash questions and references, to check whether two runs answered the same questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.text, question.reference]).encode())
    return digest.hexdigest()


def image_file(folder: Path, name: str) -> dict[str, Any]:
    """Return the fields `image` and `load` of a question whose image is a file below `folder`."""
    return {"image": f"{folder}/{name}", "load": partial(read_image_bytes, folder, name)}


def read_json(path: Path) -> Any:
    """Read a JSON file; raises DataError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value in each line that is not empty; raises DataError that names the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines()):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise DataError(f"{path} line {number + 1} is not JSON: {error}") from None
    return rows


def write_submission(output: Path, name: str, content: Any) -> Path:
    """Write a JSON submission file and return its path."""
    path = output / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def options_of(choices: Mapping[str, str]) -> str:
    """Return options by letter as lines "A. …", each after a line break."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())
