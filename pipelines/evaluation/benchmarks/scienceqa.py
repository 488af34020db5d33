"""ScienceQA, the questions of the test split that have an image: accuracy by option letter ("IMG").

Lu et al. 2022; parsing as in LLaVA's eval_science_qa.py, whose accuracy the papers report. An answer without a letter is wrong.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from switchkd.pipelines.evaluation.benchmarks.base import (
    OPTION_LETTER,
    Answer,
    Benchmark,
    Question,
    Split,
    image_file,
    options_of,
    read_json,
)

LETTERS = "ABCDE"
_STARTS = re.compile(rf"([{LETTERS}])\. ")
# In this order: one with a full stop has priority over an earlier one without.
_SAYS = (re.compile(rf"The answer is ([{LETTERS}])\."), re.compile(rf"The answer is ([{LETTERS}])"))


def letter_of(text: str) -> str:
    """Return the letter that an answer chooses: alone, in front ("B. …"), or after "The answer is"; else ""."""
    text = text.replace("\n", ". ")
    if text.strip() in set(LETTERS):
        return text.strip()
    found = _STARTS.match(text) or _SAYS[0].search(text) or _SAYS[1].search(text)
    return found.group(1) if found else ""


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return 1 for the right letter, else 0."""
    (answer,) = answers
    return (float(letter_of(answer.prediction) == answer.reference),)


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    problems = read_json(files["problems.json"])
    out = []
    for name in read_json(files["pid_splits.json"])[split]:
        problem = problems[name]
        if not problem["image"]:
            continue
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        out.append(
            Question(
                id=name,
                text=context
                + problem["question"]
                + options_of(dict(zip(LETTERS, problem["choices"], strict=False)))
                + OPTION_LETTER,
                **image_file(files[f"images/{split}/"], f"{name}/{problem['image']}"),
                reference=LETTERS[problem["answer"]],
                group=problem.get("subject", ""),
            )
        )
    return out


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="SciQA",
    folder="scienceqa",
    metric="accuracy, questions with an image",
    home="github.com/lupantech/ScienceQA (data/scienceqa and its image archives)",
    source="Lu et al. 2022; eval_science_qa.py (LLaVA)",
    splits={"test": Split(("problems.json", "pid_splits.json", "images/test/"))},
    read=_read,
    judge=judge,
)
