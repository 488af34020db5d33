"""Paired comparisons of an ablation's arms: over seeds with Holm's correction, and over questions by bootstrap.

The measure is the macro average: the mean over kinds of question of the share of right answers; where all kinds are named
"GROUP/KIND", the mean over groups of the mean over their kinds. The rotations of one question count as one question. Statistics
are scipy's and statsmodels'.
"""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import ConfigError
from switchkd.pipelines.ablation.cells import is_of_arm
from switchkd.pipelines.ablation.plan import Job
from switchkd.pipelines.ablation.recipe import Recipe
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.run_folder import PREDICTIONS, write_atomically

RESAMPLES = 10_000
CONFIDENCE = 0.95

# Kind of question → id of a question → share of it that was answered correctly, 0 … 1
Answers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Difference:
    """One arm's macro average minus another's, 0 … 1."""

    arm: str
    other: str
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    questions: int
    p: (
        float | None
    )  # two-sided paired t-test over seeds; None with fewer than two seeds, or if all differences are equal
    adjusted_p: float | None  # by Holm, over the pairs of the recipe
    over_seeds: tuple[float, float] | None  # 95 % interval of the t-test
    over_questions: tuple[
        float, float
    ]  # 95 %, percentile bootstrap within kinds of the differences averaged over seeds

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.by_seed))


def require_statistics() -> None:
    """Raise ConfigError if scipy or statsmodels is not installed."""
    if missing := [name for name in ("scipy", "statsmodels") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"arms are compared with {missing[0]}: pip install 'switchkd[evidence]'")


def macro(answers: Answers) -> float:
    """Return the macro average: mean over groups of the mean over kinds of the mean over questions."""
    weights = weights_of(answers)
    return sum(weights[kind] * float(np.mean(list(found.values()))) for kind, found in answers.items())


def weights_of(kinds: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each kind in the macro average; they sum to 1. Kinds are in groups if all are named "GROUP/KIND"."""
    grouped = all("/" in kind for kind in kinds)  # easy-VQA's "yes/no" stands beside kinds without a group
    groups: dict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        groups[kind.partition("/")[0] if grouped else ""].append(kind)
    return {kind: 1 / len(groups) / len(members) for members in groups.values() for kind in members}


def read_answers(predictions: Path, data: Path) -> Answers:
    """Read an evaluation's predictions; the rotations of one question, `unit` in a JSON data file, are one question.

    Args:
        predictions: `predictions.jsonl` of `switchkd eval`. data: the data file that it answered.
    """
    units: dict[int, str] = {}
    if data.suffix == ".json":
        rows = json.loads(data.read_text())
        units = {row: str(one["unit"]) for row, one in enumerate(rows) if isinstance(one, dict) and one.get("unit")}
    members: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for line in predictions.read_text().splitlines():
        found = json.loads(line)
        if "correct" in found:
            name = units.get(found["row"], f"{found['row']}/{found['turn']}")
            members[found["question_type"] or "other"][name].append(found["correct"])
    return {
        kind: {name: float(all(right)) for name, right in sorted(of_kind.items())}
        for kind, of_kind in sorted(members.items())
    }


def compare(
    arms: Mapping[str, Mapping[int, Answers]], pairs: Sequence[tuple[str, str]], seed: int = 0
) -> list[Difference]:
    """Compare arms pair by pair over the seeds that both have.

    Args:
        arms: arm → seed → answers to the same questions. pairs: (arm, other). seed: of the bootstrap.

    Raises:
        ConfigError: two arms have no seed in common.
        ValueError: two runs answered different questions.
    """
    from statsmodels.stats.multitest import multipletests

    found = [_difference(arms, arm, other, seed) for arm, other in pairs]
    tested = [index for index, one in enumerate(found) if one.p is not None]
    if not tested:
        return found
    adjusted = multipletests([found[index].p for index in tested], method="holm")[1]
    by_index = dict(zip(tested, map(float, adjusted), strict=True))
    return [Difference(**{**one.__dict__, "adjusted_p": by_index.get(index)}) for index, one in enumerate(found)]


def _difference(arms: Mapping[str, Mapping[int, Answers]], arm: str, other: str, seed: int) -> Difference:
    from scipy import stats

    seeds = sorted(arms[arm].keys() & arms[other].keys())
    if not seeds:
        raise ConfigError(f"{arm} and {other} have no seed in common")
    gains = [_gain(arms[arm][one], arms[other][one]) for one in seeds]
    weights = weights_of(gains[0])
    by_seed = [sum(weights[kind] * float(values.mean()) for kind, values in gain.items()) for gain in gains]
    p, over_seeds = None, None
    if len(seeds) > 1 and np.ptp(by_seed) > 0:
        test = stats.ttest_1samp(by_seed, 0.0)
        low, high = test.confidence_interval(CONFIDENCE)
        p, over_seeds = float(test.pvalue), (float(low), float(high))
    mean = {kind: np.mean([gain[kind] for gain in gains], axis=0) for kind in gains[0]}
    return Difference(
        arm,
        other,
        tuple(seeds),
        tuple(by_seed),
        sum(map(len, mean.values())),
        p,
        None,
        over_seeds,
        _over_questions(mean, weights, seed),
    )


def _gain(one: Answers, other: Answers) -> dict[str, NDArray[np.float64]]:
    """Return kind → difference of each question, [questions]."""
    if {kind: list(found) for kind, found in one.items()} != {kind: list(found) for kind, found in other.items()}:
        raise ValueError("two runs answered different questions")
    return {kind: np.array(list(found.values())) - np.array(list(other[kind].values())) for kind, found in one.items()}


def _over_questions(
    mean: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float], seed: int
) -> tuple[float, float]:
    """Return the percentile interval of the macro difference over questions drawn anew within each kind."""
    from scipy import stats

    moving = {kind: values for kind, values in mean.items() if len(values) > 1 and np.ptp(values) > 0}
    fixed = sum(weights[kind] * float(values.mean()) for kind, values in mean.items() if kind not in moving)
    if not moving:
        return fixed, fixed

    def macro_of(*drawn: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        parts = [weights[kind] * values.mean(axis=axis) for kind, values in zip(moving, drawn, strict=True)]
        total: NDArray[np.float64] = np.sum(parts, axis=0) + fixed
        return total

    found = stats.bootstrap(
        tuple(moving.values()), macro_of, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        vectorized=True, batch=250, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def write_comparisons(workdir: Path, recipe: Recipe, jobs: Sequence[Job]) -> Path:
    """Write NAME-tests.md: each arm's macro average, and every pair that the recipe compares. All cells are finished."""
    assert recipe.compare is not None
    arms: dict[str, dict[int, Answers]] = {}
    for name, axes in recipe.compare.arms.items():
        arms[name] = {
            job.cell.seed: read_answers(job.evaluation.output / PREDICTIONS, job.evaluation.data)
            for job in jobs
            if job.cell is not None and is_of_arm(job.cell, axes) and isinstance(job.evaluation, EvalOptions)
        }
    path = workdir / f"{recipe.name}-tests.md"
    write_atomically(path, markdown(arms, compare(arms, recipe.compare.pairs)))
    return path


def markdown(arms: Mapping[str, Mapping[int, Answers]], differences: Sequence[Difference]) -> str:
    """Return the comparisons as Markdown, percent."""
    lines = ["# Macro averages", "", "| arm | mean | each seed |", "| --- | ---: | ---: |"]
    for name, by_seed in arms.items():
        values = [100 * macro(answers) for _, answers in sorted(by_seed.items())]
        lines.append(f"| {name} | {np.mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    lines += [
        "",
        "# Differences",
        "",
        "| pair | difference | each seed | 95 % over seeds (t) | p | p, Holm | 95 % over questions (bootstrap) | questions |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in differences:
        cells = [
            f"{one.arm} - {one.other}",
            f"{100 * one.mean:+.2f}",
            ", ".join(f"{100 * value:+.2f}" for value in one.by_seed),
            "–" if one.over_seeds is None else f"{100 * one.over_seeds[0]:+.2f} … {100 * one.over_seeds[1]:+.2f}",
            "–" if one.p is None else f"{one.p:.4f}",
            "–" if one.adjusted_p is None else f"{one.adjusted_p:.4f}",
            f"{100 * one.over_questions[0]:+.2f} … {100 * one.over_questions[1]:+.2f}",
            f"{one.questions:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
