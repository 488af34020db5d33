"""POPE: questions whether an object is in the image; accuracy and F1 of "yes" over three ways of choosing absent objects.

Li et al. 2023; official script evaluate.py. The headline is the mean F1 of the three parts, as LLaVA-1.5 reports it.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    Split,
    image_file,
)
from switchkd.pipelines.evaluation.intervals import Means, Unit

PARTS = ("random", "popular", "adversarial")


def says_yes(text: str) -> bool:
    """Return False if the first sentence holds the word "No", "no" or "not", else True."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return (true positive, false positive, true negative, false negative), one of them 1."""
    (answer,) = answers
    yes, there = says_yes(answer.prediction), answer.reference == "yes"
    return float(yes and there), float(yes and not there), float(not yes and not there), float(not yes and there)


def headline(means: Means) -> NDArray[np.float64]:
    """Return 100 × the mean F1 of the parts."""
    return np.mean([_figures(means[part])["f1"] for part in PARTS], axis=0)  # type: ignore[no-any-return]


def details(units: Sequence[Unit]) -> dict[str, float]:
    """Return accuracy, precision, recall, F1 and the share of "yes" of each part, and the means of accuracy and F1."""
    parts: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for unit in units:
        parts[unit.stratum].append(unit.values)
    figures = {part: _figures(np.mean(parts[part], axis=0)) for part in PARTS if part in parts}
    out = {f"{part}_{name}": float(value) for part, found in figures.items() for name, value in found.items()}
    for name in ("accuracy", "f1"):
        if figures.keys() == set(PARTS):
            out[f"mean_{name}"] = float(np.mean([found[name] for found in figures.values()]))
    return out


def _figures(means: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of one part in percent, from the means of the four counts; a ratio with denominator 0 is 0."""
    true_yes, false_yes, true_no, false_no = (means[..., place] for place in range(4))

    def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100 * part / np.where(whole > 0, whole, np.inf)

    return {
        "accuracy": 100 * (true_yes + true_no),
        "precision": ratio(true_yes, true_yes + false_yes),
        "recall": ratio(true_yes, true_yes + false_no),
        "f1": ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes": 100 * (true_yes + false_yes),
    }


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    out = []
    for part in PARTS:
        path = files[f"coco_pope_{part}.json"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            try:
                row = json.loads(line)
                out.append(
                    Question(
                        id=f"{part}/{row['question_id']}",
                        text=row["text"] + SHORT_ANSWER,
                        **image_file(files["val2014/"], row["image"]),
                        reference=row["label"],
                        stratum=part,
                    )
                )
            except (ValueError, KeyError) as error:
                raise DataError(f"{path} line {number + 1} is no question of POPE: {error!r}") from None
    return out


_TABLES = tuple(f"coco_pope_{part}.json" for part in PARTS)
POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    metric="F1 of yes, mean of random, popular and adversarial",
    home="github.com/AoiDragon/POPE, output/coco; images: COCO val2014 (a link to those of VQAv2 will do)",
    source="Li et al. 2023; evaluate.py",
    splits={"coco": Split((*_TABLES, "val2014/"), llava={name: f"pope/coco/{name}" for name in _TABLES})},
    read=_read,
    judge=judge,
    headline=headline,
    details=details,
    interval="bootstrap",
)
