"""What an ablation consists of: the training runs, stores and evaluations of every cell of a recipe.

Every result is named by a hash of its inputs: two cells with the same pre-training share that run, and two recipes with the same
cell in one working folder share it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from switchkd.errors import InputError
from switchkd.fingerprints import hash_json
from switchkd.losses.baselines import BASELINES
from switchkd.pipelines.ablation import small_models
from switchkd.pipelines.ablation.cells import DISTILLED, Cell
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.recipe import Recipe
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions
from switchkd.pipelines.run_folder import to_plain
from switchkd.pipelines.training.inputs import precision_here
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions
from switchkd.pipelines.training.stages import with_stage

# Options of a training stage that define the encoding of samples; a distilled stage's store is created with them and records them.
ENCODING = ("template", "max_length", "image_mode", "max_pixels")
# Options of training, capture and evaluation that earlier versions did not have, with their defaults.
LATER = {"limit": None, "weight_by": None, "attention_layer": None, "visual_advantage": False}


@dataclass(frozen=True)
class Run:
    """One training run, and the store that it reads."""

    entry: str  # of the recipe, for messages
    options: TrainOptions
    cache: CacheOptions | None
    student: Path  # the untrained model that its student was or will be made from
    teacher: Path | None = None  # the same of its teacher

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.options.output.name


@dataclass(frozen=True)
class Job:
    """A row of the results: a cell with the runs that lead to it, or a teacher that is only evaluated."""

    cell: Cell | None
    name: str
    runs: tuple[Run, ...]
    evaluation: EvalOptions | BenchmarkOptions
    result: Path  # written last; a job that has it is finished


def plan_jobs(recipe: Recipe, options: AblateOptions) -> Iterator[Job]:
    """Resolve every cell to its runs; raises ConfigError where options contradict each other."""
    for name in recipe.teachers:
        runs = _teacher_runs(recipe, options, name)
        model = runs[-1].options.output if runs else _teacher_start(recipe, options, name)
        yield _job(recipe, options, None, f"teacher {name}", runs, model)
    for cell in recipe.cells:
        start = small_models.untrained_path(
            options.workdir / "models", cell.student, recipe.students[cell.student], cell.seed
        )
        runs = []
        for stage in cell.stages:
            with naming(f"recipe {recipe.name}: stages: {stage}"):
                runs.append(_cell_run(recipe, options, cell, stage, start, runs[-1].options.output if runs else start))
        yield _job(recipe, options, cell, str(cell), runs, runs[-1].options.output)


def _job(recipe: Recipe, options: AblateOptions, cell: Cell | None, name: str, runs: list[Run], model: Path) -> Job:
    with naming(f"recipe {recipe.name}: evaluate"):
        kind = BenchmarkOptions if "tasks" in recipe.evaluate else EvalOptions
        evaluation = kind(**{"device": options.device, **recipe.evaluate}, model=model, output=Path())
    named = {name: value for name, value in _named(evaluation).items() if name != "retry_failed"}
    if isinstance(evaluation, EvalOptions):
        del named["baseline"]  # that of benchmarks has always been there; no recipe sets either
    # Answers are kept by benchmark and question, so evaluations that differ in these share a folder.
    answers = {name: value for name, value in named.items() if name not in ("limit", "tasks", "benchmarks")}
    evaluation = replace(evaluation, output=options.workdir / "evals" / _digest(answers))
    return Job(cell, name, tuple(runs), evaluation, options.workdir / f"cells/{_digest(named)}.json")


def _cell_run(recipe: Recipe, options: AblateOptions, cell: Cell, stage: str, untrained: Path, start: Path) -> Run:
    given = dict(recipe.stages[stage]) | cell.options_of(stage)
    if stage not in DISTILLED:
        return _run(options, stage, start, cell.seed, given, untrained)
    assert cell.teacher is not None
    teacher_runs = _teacher_runs(recipe, options, cell.teacher)
    teacher_start = _teacher_start(recipe, options, cell.teacher)
    teacher = teacher_runs[-1].options.output if teacher_runs else teacher_start
    parts = with_stage(stage, given)["train_parts"]
    # VSD trains the vision tower; a distilled training stage that leaves it frozen has Align alone.
    given |= {"objective": cell.objective, "switch": cell.switch and "vision" in parts, "teacher": teacher}
    if cell.objective == "switch-ce":
        if not given["switch"]:  # no pathway, no second CE
            plain = {name: value for name, value in given.items() if name not in ("objective", "switch", "teacher")}
            return _run(options, DISTILLED[stage], start, cell.seed, plain, untrained)
        return _run(options, stage, start, cell.seed, given, untrained, teacher_start)
    if cell.objective in BASELINES:
        given["teacher_mode"] = "live"
    signal = recipe.signals[cell.signal] if cell.signal is not None else {"cache": {}, "train": {}}
    given |= signal["train"]
    if given.get("teacher_mode") == "live":
        return _run(options, stage, start, cell.seed, given, untrained, teacher_start)
    cache = _cache_options(recipe, options, cell.teacher, stage, teacher, signal["cache"])
    # Training takes these from the store's manifest.
    given = {name: value for name, value in given.items() if name not in ENCODING}
    return _run(options, stage, start, cell.seed, given | {"cache": cache.out}, untrained, teacher_start, cache)


def _run(
    options: AblateOptions,
    stage: str,
    start: Path,
    seed: int,
    given: Mapping[str, Any],
    untrained: Path,
    teacher: Path | None = None,
    cache: CacheOptions | None = None,
) -> Run:
    resolved = TrainOptions(**with_stage(stage, {**given, "student": start, "seed": seed, "output": Path()}))
    if resolved.precision is None:
        resolved = replace(resolved, precision=precision_here())
    # Names from before the default was chosen by the data stay the same.
    named = _without_later(to_plain(resolved)) | {"group_by": resolved.group_by or "none"}
    digest = _digest({k: v for k, v in named.items() if k not in RESUMABLE_CHANGES})
    resolved = replace(resolved, output=options.workdir / "runs" / f"{stage}-{digest}")
    return Run(f"stages: {stage}", resolved, cache, untrained, teacher)


def _cache_options(
    recipe: Recipe, options: AblateOptions, name: str, stage: str, teacher: Path, signal: Mapping[str, Any]
) -> CacheOptions:
    stage_options = recipe.stages[stage]
    given = {name: stage_options[name] for name in ("data", "images", *ENCODING) if stage_options.get(name) is not None}
    with naming("cache"):
        made = CacheOptions(
            **{"device": options.device, **recipe.cache, **signal, **given}, teacher=teacher, out=Path("x.zarr")
        )
    digest = _digest(_named(made))
    return replace(made, out=options.workdir / "stores" / f"{name}-{stage}-{digest}.zarr")


def _teacher_start(recipe: Recipe, options: AblateOptions, name: str) -> Path:
    return small_models.untrained_path(options.workdir / "models", name, recipe.teachers[name], seed=0)


def _teacher_runs(recipe: Recipe, options: AblateOptions, name: str) -> list[Run]:
    """Return the training runs of a teacher that the recipe trains itself; none for a checkpoint."""
    model, runs = recipe.teachers[name], []
    start = _teacher_start(recipe, options, name)
    for stage, given in ({} if isinstance(model, str) else model.get("train", {})).items():
        with naming(f"recipe {recipe.name}: teachers: {name}: train: {stage}"):
            run = _run(options, stage, start, 0, given, _teacher_start(recipe, options, name))
        runs.append(replace(run, entry=f"teachers: {name}: train: {stage}"))
        start = runs[-1].options.output
    return runs


def _named(options: CacheOptions | EvalOptions | BenchmarkOptions) -> dict[str, Any]:
    """Return what names a store or an evaluation; the default number of workers is that of any machine."""
    return _without_later(to_plain(options)) | {"workers": options.workers or 0}


def _without_later(named: dict[str, Any]) -> dict[str, Any]:
    """Leave out options that came after the first recipes and have their defaults, so that names from before stay the same."""
    return {name: value for name, value in named.items() if name not in LATER or value != LATER[name]}


def _digest(content: dict[str, Any]) -> str:
    return hash_json(content)[:12]


@contextmanager
def naming(entry: str) -> Iterator[None]:
    """Begin the message of an InputError with the entry of a recipe that it is about."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(entry):
            raise
        raise type(error)(f"{entry}: {error}") from error
