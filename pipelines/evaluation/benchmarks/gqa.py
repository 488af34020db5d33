"""GQA, balanced testdev: exact match of short answers.

Hudson and Manning 2019; official script eval.py, accuracy. As LLaVA's convert_gqa_for_eval.py does, an answer is lower-cased and
loses its final full stop before it is compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from switchkd.pipelines.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    Split,
    image_file,
    read_json,
)


def exact_match(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return 1 for the reference answer, else 0."""
    (answer,) = answers
    return (float(answer.prediction.rstrip(".").lower() == answer.reference),)


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    rows = read_json(files[f"{split}_balanced_questions.json"])
    return [
        Question(
            id=name,
            text=row["question"] + SHORT_ANSWER,
            **image_file(files["images/"], f"{row['imageId']}.jpg"),
            reference=row["answer"],
            group=row.get("types", {}).get("structural", ""),
        )
        for name, row in rows.items()
    ]


_FILES = ("testdev_balanced_questions.json", "images/")
GQA = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    metric="exact match",
    home="cs.stanford.edu/people/dorarad/gqa (questions 1.2, images)",
    source="Hudson and Manning 2019; eval.py",
    splits={"testdev": Split(_FILES, llava={name: f"gqa/data/{name}" for name in _FILES})},
    read=_read,
    judge=exact_match,
)
