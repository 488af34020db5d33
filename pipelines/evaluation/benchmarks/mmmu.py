"""MMMU: college questions, multiple choice and open, parsed by the official rules.

Yue et al. 2024; official script eval_utils.py (`parse_multi_choice_response`, `parse_open_response`, `eval_open`), prompts of its
LLaVA-1.5 configuration. The model gets the first image of a question; "<image 2>" and further markers remain text.
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.data.samples import BadSample, Status
from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import (
    OPTION_LETTER,
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    Split,
    by_group,
    write_submission,
)
from switchkd.pipelines.evaluation.intervals import Unit

SUBJECTS = """
    Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry Clinical_Medicine
    Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power Finance Geography History
    Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics Psychology Public_Health Sociology
""".split()  # noqa: SIM905
LETTERS = "ABCDEFGHI"
# An open answer is searched for after these words; "=" counts in the last line only.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def choose(text: str, options: Sequence[str], seed: str) -> tuple[str, bool]:
    """Return the option letter of an answer, and whether it had to be guessed.

    A letter in brackets has priority, then one between spaces, then, in answers of more than five words, an option's own text;
    of several the last one counts. If none is found, the official rule draws one at random; here the generator has seed `seed`.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    places = {letter: text.rfind(f"({letter})") for letter in letters}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in letters}
    if max(places.values()) < 0 and len(text.split()) > 5:
        low = text.lower()
        places = {letter: low.rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    if max(places.values()) < 0:
        return random.Random(seed).choice(letters), True
    return max(letters, key=places.__getitem__), False


def open_answers(text: str) -> set[str | float]:
    """Return all candidates of an open answer: the text after words such as "is", and the numbers in it."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []
    for number, line in enumerate(lines):
        marks = (*INDICATORS, "=") if number == len(lines) - 1 else INDICATORS
        shortest = ""
        for mark in marks:
            tail = line.split(mark)[-1].strip()
            if mark in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in set(":,.!?;'"):
            tails.append(shortest)
    tails = tails or [text]
    numbers = [n for tail in tails for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for n in pattern.findall(tail)]
    return {form for piece in (*tails, *numbers) for form in _forms(piece)}


def open_right(text: str, references: Sequence[str]) -> bool:
    """Return whether an open answer contains one of the references: as a substring, or as an equal number."""
    wanted = {form for reference in references for form in _forms(reference)}
    words = [form for form in wanted if isinstance(form, str)]
    return any(
        any(word in form for word in words) if isinstance(form, str) else form in wanted for form in open_answers(text)
    )


def _forms(text: str) -> list[str | float]:
    """Return a number rounded to two places, or lower-case text; a single character only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return 1 for a right answer, and 1 if it was guessed."""
    (answer,) = answers
    reference = answer.reference
    if reference["type"] != "multiple-choice":
        return float(open_right(answer.prediction, reference["answer"])), 0.0
    letter, guessed = choose(answer.prediction, reference["options"], reference["id"])
    return float(letter in reference["answer"]), float(guessed)


def details(units: Sequence[Unit]) -> dict[str, float]:
    """Return the share of answers that had to be guessed, and the accuracy of each subject."""
    guessed = {"guessed": 100 * sum(unit.values[1] for unit in units) / len(units)} if units else {}
    return guessed | by_group(units)


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    import pyarrow.parquet

    out = []
    for subject in SUBJECTS:
        columns = ["id", "question", "options", "answer", "question_type", "image_1"]
        pattern = files[f"{subject}/{split}-*.parquet"]
        for path in sorted(pattern.parent.glob(pattern.name)):
            try:
                rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path} cannot be read as a table of MMMU: {error}") from None
            out += [_question(row, path, subject, scored=split == "validation") for row in rows]
    return out


def _question(row: Mapping[str, Any], path: Path, subject: str, scored: bool) -> Question:
    options = ast.literal_eval(row["options"] or "[]")
    choice = row["question_type"] == "multiple-choice"
    lettered = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{row['question']}\n\n{lettered}\n{OPTION_LETTER}" if choice else f"{row['question']}\n{SHORT_ANSWER}"
    answer = row["answer"]
    several = not choice and answer.startswith("[")
    return Question(
        id=row["id"],
        text=text,
        image=f"{path}#{row['id']}",
        load=partial(_image_of, row),
        reference={
            "id": row["id"],
            "type": row["question_type"],
            "options": options,
            "answer": None if not scored else ast.literal_eval(answer) if several else [answer],
        },
        group=subject,
    )


def _image_of(row: Mapping[str, Any]) -> bytes:
    data = (row["image_1"] or {}).get("bytes")
    if not data:
        raise BadSample(Status.IMAGE_MISSING, f"{row['id']}: image_1 is empty")
    return bytes(data)


def _submit(
    questions: Sequence[Question], predictions: Mapping[str, str], files: Mapping[str, Path], output: Path
) -> Path:
    """Write {id: answer}: the parsed letter of a multiple choice, the text of an open answer."""
    rows = {}
    for q in questions:
        text = predictions.get(q.id, "")
        choice = q.reference["type"] == "multiple-choice"
        rows[q.id] = choose(text, q.reference["options"], q.id)[0] if choice else text
    return write_submission(output, "mmmu_results.json", rows)


MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    folder="mmmu",
    metric="accuracy",
    home="huggingface.co/datasets/MMMU/MMMU (a folder of Parquet files for each subject)",
    source="Yue et al. 2024; eval_utils.py",
    splits={
        split: Split(tuple(f"{subject}/{split}-*.parquet" for subject in SUBJECTS), scored=split == "validation")
        for split in ("validation", "test")
    },
    read=_read,
    judge=judge,
    details=details,
    submit=_submit,
)
