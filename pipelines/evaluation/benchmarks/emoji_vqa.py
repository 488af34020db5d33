"""EmojiVQA, the suite that `switchkd data emoji-vqa` builds: exact match, averaged over kinds of question.

A question is asked as its data file has it. The four rotations of a choice are one unit, as in MMBench.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import (
    Answer,
    Benchmark,
    Question,
    Split,
    by_group,
    image_file,
    read_json,
)
from switchkd.pipelines.evaluation.intervals import Means, Unit

SPLITS = ("style", "combo", "iid", "concept", "degraded", "val")


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return 1 if every answer equals its reference after lower-casing, without a final full stop, repeated space collapsed."""
    return (float(all(_plain(answer.prediction) == _plain(answer.reference) for answer in answers)),)


def headline(means: Means) -> NDArray[np.float64]:
    """Return 100 × the mean over kinds of question of the share of right units."""
    return np.mean([100 * rows[..., 0] for rows in means.values()], axis=0)  # type: ignore[no-any-return]


def details(units: Sequence[Unit]) -> dict[str, float]:
    """Return the share of right units of every kind, and of all units (`micro`)."""
    return by_group(units) | {"micro": 100 * float(np.mean([unit.values[0] for unit in units]))}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    path = files[f"{split}.json"]
    rows = read_json(path)
    try:
        return [
            Question(
                id=row["id"],
                text=row["conversations"][0]["value"].removeprefix("<image>\n"),
                **image_file(files["images/"], row["image"]),
                reference=row["conversations"][1]["value"],
                unit=row.get("unit", ""),
                stratum=row["question_type"],
                group=row["question_type"],
            )
            for row in rows
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} is no data file of EmojiVQA: {error!r}; build it with `switchkd data emoji-vqa`"
        ) from None


EMOJI_VQA = Benchmark(
    name="emoji-vqa",
    title="EmojiVQA",
    folder="emoji-vqa",
    metric="exact match, mean over kinds of question",
    home="`switchkd data emoji-vqa --out emoji-vqa` builds it",
    source="here; rotations of a choice as in MMBench",
    splits={split: Split((f"{split}.json", "images/")) for split in SPLITS},
    read=_read,
    judge=judge,
    headline=headline,
    details=details,
    interval="bootstrap",
)
