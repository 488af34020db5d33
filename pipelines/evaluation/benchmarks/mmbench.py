"""MMBench, English and Chinese: a question counts only if it is answered right under every rotation of its options.

Liu et al. 2023, circular evaluation; the option is read from an answer by the exact-matching rules of the official evaluation
(VLMEvalKit, `can_infer`, without its variable VERBOSE): a letter that stands alone, else the one option whose text the answer
repeats. For answers with neither, the official server may also query a language model; here they count as wrong.
"""

import base64
import binascii
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.data.samples import BadSample, Status
from switchkd.errors import ConfigError, DataError
from switchkd.pipelines.evaluation.benchmarks.base import (
    OPTION_LETTER,
    Answer,
    Benchmark,
    Question,
    Split,
    by_group,
    options_of,
)
from switchkd.pipelines.evaluation.intervals import Unit

LETTERS = "ABCD"
ROTATION = 1_000_000  # the rotations of question i have the indices i + ROTATION, i + 2 ROTATION, …
OPTION_LETTER_CN = "\n请直接回答选项字母。"
# An image column at most this long contains the index of the row that has the image.
LONGEST_INDEX = 64
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Answers with one of these choose no option, whatever else is in them.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def option_in(text: str, options: Mapping[str, str]) -> str:
    """Return the letter of the option that an answer names, or "", by the rules of VLMEvalKit's `can_infer`.

    A letter counts if no other one stands alone and it is among the last five words. Otherwise the only option counts whose text is
    in the answer, if that is at most twice as long as all options together. "Z" alone and the known refusals choose nothing.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return ""
    words = text.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if (not letters and "Z" in words) or len(text) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return 1 if every rotation is answered correctly, and 1 if the unrotated question is."""
    right = [option_in(a.prediction, a.reference["options"]) == a.reference["answer"] for a in answers]
    return float(all(right)), float(right[0])


def details(units: Sequence[Unit]) -> dict[str, float]:
    """Return the accuracy without rotations, and the circular accuracy of each ability."""
    vanilla = {"without_rotation": 100 * sum(unit.values[1] for unit in units) / len(units)} if units else {}
    return vanilla | by_group(units)


def _reader(files: Mapping[str, str], suffix: str) -> Callable[[Mapping[str, Path], str], list[Question]]:
    def read(found: Mapping[str, Path], split: str) -> list[Question]:
        if split == "test":
            _need_openpyxl()
        path = found[files[split]]
        rows = _rows_of(path)
        if not any(index >= ROTATION for index in rows):
            raise DataError(
                f"{path} holds no rotated questions (index {ROTATION} and above): circular evaluation needs them"
            )
        out = []
        for index, row in sorted(rows.items()):
            options = {letter: row[letter] for letter in LETTERS if (row.get(letter) or "nan") != "nan"}
            hint = "" if (row.get("hint") or "nan") == "nan" else row["hint"] + "\n"
            out.append(
                Question(
                    id=str(index),
                    text=hint + row["question"] + options_of(options) + suffix,
                    image=f"{path}#{index}",
                    load=partial(_image_of, rows, index),
                    reference={"question": row["question"], "options": options, "answer": row.get("answer")},
                    unit=str(index % ROTATION),
                    group=row.get("l2-category") or row.get("category") or "",
                )
            )
        return out

    return read


def _rows_of(path: Path) -> dict[int, dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # images are fields of several hundred kilobytes
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {int(row["index"]): row for row in csv.DictReader(file, delimiter="\t")}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is no MMBench table: {error!r}; expected tab-separated columns with 'index'") from None


def _image_of(rows: Mapping[int, Mapping[str, Any]], index: int) -> bytes:
    text = rows[index].get("image") or ""
    try:
        if len(text) <= LONGEST_INDEX:
            text = rows[int(text)]["image"]
        return base64.b64decode(text, validate=True)
    except (KeyError, ValueError, binascii.Error) as error:
        raise BadSample(Status.IMAGE_UNREADABLE, f"row {index}: {error!r}") from None


def _need_openpyxl() -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise ConfigError(
            "the submission file of MMBench's test split is a spreadsheet: pip install 'switchkd[eval]' (openpyxl)"
        ) from None
    return openpyxl


def _submit(
    questions: Sequence[Question], predictions: Mapping[str, str], files: Mapping[str, Path], output: Path
) -> Path:
    """Write the spreadsheet for the official server: one row per rotation, with its prediction."""
    book = _need_openpyxl().Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["index", "question", *LETTERS, "prediction"])
    for q in questions:
        options = [q.reference["options"].get(letter) for letter in LETTERS]
        sheet.append([int(q.id), q.reference["question"], *options, predictions.get(q.id, "")])
    path = output / "submission.xlsx"
    book.save(path)
    return path


def _mmbench(name: str, title: str, files: Mapping[str, str], suffix: str, llava: str = "") -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder="mmbench",
        metric="circular accuracy",
        home="github.com/open-compass/MMBench (tab-separated files with images inside)",
        source="Liu et al. 2023; circular evaluation with exact matching (VLMEvalKit)",
        splits={
            split: Split((file,), scored=split != "test", llava={file: f"{llava}/{file}"} if llava else {})
            for split, file in files.items()
        },
        read=_reader(files, suffix),
        judge=judge,
        details=details,
        submit=_submit,
    )


MMBENCH = _mmbench(
    "mmbench", "MMB", {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"}, OPTION_LETTER
)
MMBENCH_CN = _mmbench(
    "mmbench-cn",
    "MMB-CN",
    {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"},
    OPTION_LETTER_CN,
    llava="mmbench_cn",
)
