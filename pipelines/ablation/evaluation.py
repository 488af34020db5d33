"""The evaluation of a cell: exact match on a data file, or scores on benchmarks."""

from collections.abc import Mapping
from dataclasses import dataclass

from switchkd.errors import ConfigError, RunError
from switchkd.pipelines.evaluation.benchmarks.layouts import find_files
from switchkd.pipelines.evaluation.benchmarks.registry import parse_tasks
from switchkd.pipelines.evaluation.benchmarks.results import read_results
from switchkd.pipelines.evaluation.benchmarks.run import run_benchmarks
from switchkd.pipelines.evaluation.exact_match import evaluate as exact_match
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions

ACCURACY, MEAN_SCORE = "accuracy", "mean score"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    measure: str  # ACCURACY, 0 … 1, or MEAN_SCORE, of benchmarks, 0 … 100
    value: float
    parts: Mapping[str, float]  # by kind of question, or by benchmark; with a label where only a sample was asked
    questions: int  # scored: questions, or units of benchmarks

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.measure == ACCURACY else f"{self.value:.2f}"


def evaluate(options: EvalOptions | BenchmarkOptions) -> Evaluation:
    """Evaluate a model; an interrupted evaluation goes on.

    Raises:
        RunError: a benchmark has no score, for the reason that it names.
    """
    if isinstance(options, EvalOptions):
        scores = exact_match(options)
        label = "" if scores.limited_to is None else f" (sample of {scores.limited_to:,})"
        parts = {kind + label: share for kind, share in scores.by_type.items()}
        return Evaluation(ACCURACY, scores.accuracy, parts, scores.questions)
    run_benchmarks(options)
    found = {(result.name, result.split): result for result in read_results(options.output)}
    parts, questions = {}, 0
    for benchmark, split in parse_tasks(options.tasks):
        result = found[benchmark.name, split]
        if result.score is None:
            raise RunError(
                f"{benchmark.name} ({split}) has no score: {result.note}, see {options.output}; mend its files and set "
                "retry_failed: true in the recipe's evaluate, or leave the benchmark out"
            )
        said = [split] if split != next(iter(benchmark.splits)) or benchmark.name in ("vqav2", "vizwiz") else []
        said += [] if result.limited_to is None else [f"sample of {result.limited_to:,}"]
        parts[benchmark.title + (f" ({', '.join(said)})" if said else "")] = result.score
        questions += result.units
    return Evaluation(MEAN_SCORE, sum(parts.values()) / len(parts), parts, questions)


def check_tasks(options: BenchmarkOptions) -> None:
    """Check that benchmarks exist, that their files are there, and that each split can be scored here.

    Raises:
        ConfigError: an unknown benchmark or split, or one whose answers are not public. DataError: a file is missing.
    """
    for benchmark, split in parse_tasks(options.tasks):
        if not benchmark.splits[split].scored:
            raise ConfigError(f"{benchmark.name} ({split}) cannot be scored here: its answers are not public")
        find_files(benchmark, options.benchmarks, split)
