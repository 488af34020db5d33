"""MME: two yes/no questions about each image, accuracy and accuracy+ of 14 tasks.

Fu et al. 2023; official script eval_tool/calculation.py. A task has 100 × accuracy (over questions) plus 100 × accuracy+ (over
images, both answers right) points: 2,000 in the ten perception tasks, 800 in the four cognition tasks. The prompt is LLaVA-1.5's:
its short-answer line stands in the place of MME's own "Please answer yes or no."
"""

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

ROOT = "MME_Benchmark_release_version"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
IMAGES = {".jpg", ".jpeg", ".png"}


def yes_or_no(text: str) -> str:
    """Return "yes", "no" or "other", from the first four characters of an answer."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def judge(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return the share of right answers about one image, and 1 if all are right."""
    right = [yes_or_no(answer.prediction) == answer.reference for answer in answers]
    return sum(right) / len(right), float(all(right))


def headline(means: Means) -> NDArray[np.float64]:
    """Return the perception points in percent of 2,000."""
    return np.sum([_points(means[task]) for task in PERCEPTION], axis=0) / 20  # type: ignore[no-any-return]


def details(units: Sequence[Unit]) -> dict[str, float]:
    """Return the points of both halves, and of every task its points, accuracy and accuracy+."""
    tasks: dict[str, list[tuple[float, ...]]] = {}
    for unit in units:
        tasks.setdefault(unit.stratum, []).append(unit.values)
    means = {task: np.mean(tasks[task], axis=0) for task in (*PERCEPTION, *COGNITION) if task in tasks}
    points = {task: float(_points(mean)) for task, mean in means.items()}
    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    whole = {
        f"{half}_points": sum(points[task] for task in names)
        for half, names in halves.items()
        if points.keys() >= set(names)
    }
    for task, mean in means.items():
        whole |= {
            f"{task}_points": points[task],
            f"{task}_accuracy": float(100 * mean[0]),
            f"{task}_accuracy_plus": float(100 * mean[1]),
        }
    return whole


def _points(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 100 × accuracy + 100 × accuracy+."""
    return 100 * means.sum(axis=-1)  # type: ignore[no-any-return]


def _read(files: Mapping[str, Path], split: str) -> list[Question]:
    out = []
    for task in (*PERCEPTION, *COGNITION):
        place = files[f"{ROOT}/{task}/"]
        # Five tasks have images and questions in two folders, the others in one.
        apart = (place / "questions_answers_YN").is_dir()
        texts = sorted((place / "questions_answers_YN" if apart else place).glob("*.txt"))
        images = place / "images" if apart else place
        found = {path.stem: path.name for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGES}
        if not texts:
            raise DataError(f"{place} holds no questions (*.txt)")
        for path in texts:
            name = found.get(path.stem, path.stem + ".jpg")
            for number, line in enumerate(filter(None, path.read_text(encoding="utf-8-sig").splitlines())):
                question, _, answer = line.rpartition("\t")
                if not question or answer.strip().lower() not in {"yes", "no"}:
                    raise DataError(f"{path} line {number + 1}: expected a question, a tab, and Yes or No")
                out.append(
                    Question(
                        id=f"{task}/{name}#{number}",
                        text=question.replace("Please answer yes or no.", "").strip() + SHORT_ANSWER,
                        **image_file(images, name),
                        reference=answer.strip().lower(),
                        unit=f"{task}/{name}",
                        stratum=task,
                    )
                )
    return out


_FOLDERS = tuple(f"{ROOT}/{task}/" for task in (*PERCEPTION, *COGNITION))
MME = Benchmark(
    name="mme",
    title="MME",
    folder="mme",
    metric="perception, % of 2,000 points",
    home="github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation (on request to its authors)",
    source="Fu et al. 2023; eval_tool/calculation.py",
    splits={"test": Split(_FOLDERS, llava={name: f"MME/{name}" for name in _FOLDERS})},
    read=_read,
    judge=judge,
    headline=headline,
    details=details,
    interval="bootstrap",
)
