"""`switchkd ablate`: train and evaluate every cell of a recipe's matrix with shared stores, and write a table of scores.

Every result is named by a hash of its inputs: two cells with the same pre-training share that run, two recipes with the same cell
in one working folder share it, and the same command again does only what is missing. A teacher is cached once per data file that
is distilled.
"""

import json
import logging
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from switchkd.data.load_template import load_template
from switchkd.errors import CheckpointError, ConfigError, DataError, RunError
from switchkd.fingerprints import hash_json
from switchkd.losses.baselines import BASELINES
from switchkd.models.checkpoint import check_compatible, open_checkpoint
from switchkd.pipelines.ablation import small_models
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.recipe import DISTILLED, Cell, Recipe, read_recipe
from switchkd.pipelines.ablation.table import Result, write_report
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.exact_match import evaluate
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import SUMMARY, to_plain, write_atomically
from switchkd.pipelines.stopwatch import Stopwatch
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions
from switchkd.pipelines.training.stages import with_stage
from switchkd.pipelines.training.train import train

# Options of a training stage that define the encoding of samples; a distilled stage's store is created with them and records them.
_ENCODING = ("template", "max_length", "image_mode")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablation:
    """The result of an ablation."""

    table: str  # Markdown
    files: tuple[Path, ...]
    cells: int
    done_before: int


@dataclass(frozen=True)
class _Run:
    """One training run, and the store that it reads."""

    options: TrainOptions
    cache: CacheOptions | None

    @property
    def name(self) -> str:
        return self.options.output.name


@dataclass(frozen=True)
class _Job:
    """A row of the results: a cell with the runs that lead to it, or a teacher that is only evaluated."""

    cell: Cell | None
    name: str
    runs: tuple[_Run, ...]
    evaluation: EvalOptions
    result: Path  # written last; a job that has it is finished


def ablate(options: AblateOptions) -> Ablation:
    """Run the unfinished jobs of a recipe, and write its table.

    Raises:
        InputError: something in the recipe cannot be used; all of it is checked before any work.
        RunError: a training run failed; what is finished stays finished.
    """
    recipe = read_recipe(options.recipe, options.settings, options.workdir)
    jobs = list(_jobs(recipe, options))
    _check(recipe, options, jobs)
    _prepare(recipe, options)
    watch = Stopwatch(options.workdir / "seconds.json")
    before = sum(job.result.is_file() for job in jobs)
    files: tuple[Path, ...] = ()
    with Progress(recipe.name, len(jobs), "cells", done=before, bar=False) as progress:
        for job in jobs:
            if job.result.is_file():
                continue
            log.info("cell: %s", job.name)
            score = _finish(job, options, watch)
            files = write_report(options.workdir, recipe, _results(jobs), final=False)
            progress.advance(1, note=f"{job.name}: {score:.4f}")
    results = _results(jobs)
    files = write_report(options.workdir, recipe, results, final=True)
    return Ablation(files[0].read_text(), files, len(jobs), before)


def _jobs(recipe: Recipe, options: AblateOptions) -> Iterator[_Job]:
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
            runs.append(_cell_run(recipe, options, cell, stage, runs[-1].options.output if runs else start))
        yield _job(recipe, options, cell, str(cell), runs, runs[-1].options.output)


def _job(recipe: Recipe, options: AblateOptions, cell: Cell | None, name: str, runs: list[_Run], model: Path) -> _Job:
    evaluation = EvalOptions(**{"device": options.device, **recipe.evaluate}, model=model, output=Path())
    digest = _digest(to_plain(evaluation))
    folder = options.workdir
    return _Job(
        cell, name, tuple(runs), replace(evaluation, output=folder / "evals" / digest), folder / f"cells/{digest}.json"
    )


def _cell_run(recipe: Recipe, options: AblateOptions, cell: Cell, stage: str, start: Path) -> _Run:
    given = dict(recipe.stages[stage])
    if stage not in DISTILLED:
        return _run(options, stage, start, cell.seed, given)
    assert cell.teacher is not None
    teacher_runs = _teacher_runs(recipe, options, cell.teacher)
    teacher = teacher_runs[-1].options.output if teacher_runs else _teacher_start(recipe, options, cell.teacher)
    parts = with_stage(stage, given)["train_parts"]
    # VSD trains the vision tower; a distilled training stage that leaves it frozen has Align alone.
    given |= {"objective": cell.objective, "switch": cell.switch and "vision" in parts, "teacher": teacher}
    if cell.objective in BASELINES:
        given["teacher_mode"] = "live"
    if given.get("teacher_mode") == "live":
        return _run(options, stage, start, cell.seed, given)
    cache = _cache_options(recipe, options, cell.teacher, stage, teacher)
    # Training takes these from the store's manifest.
    given = {name: value for name, value in given.items() if name not in _ENCODING}
    return _run(options, stage, start, cell.seed, given | {"cache": cache.out}, cache)


def _run(
    options: AblateOptions,
    stage: str,
    start: Path,
    seed: int,
    given: Mapping[str, Any],
    cache: CacheOptions | None = None,
) -> _Run:
    resolved = TrainOptions(**with_stage(stage, {**given, "student": start, "seed": seed, "output": Path()}))
    digest = _digest({k: v for k, v in to_plain(resolved).items() if k not in RESUMABLE_CHANGES})
    return _Run(replace(resolved, output=options.workdir / "runs" / f"{stage}-{digest}"), cache)


def _cache_options(recipe: Recipe, options: AblateOptions, name: str, stage: str, teacher: Path) -> CacheOptions:
    stage_options = recipe.stages[stage]
    given = {
        name: stage_options[name] for name in ("data", "images", *_ENCODING) if stage_options.get(name) is not None
    }
    made = CacheOptions(**{"device": options.device, **recipe.cache, **given}, teacher=teacher, out=Path("x.zarr"))
    digest = _digest(to_plain(made))
    return replace(made, out=options.workdir / "stores" / f"{name}-{stage}-{digest}.zarr")


def _teacher_start(recipe: Recipe, options: AblateOptions, name: str) -> Path:
    return small_models.untrained_path(options.workdir / "models", name, recipe.teachers[name], seed=0)


def _teacher_runs(recipe: Recipe, options: AblateOptions, name: str) -> list[_Run]:
    """Return the training runs of a teacher that the recipe trains itself; none for a checkpoint."""
    model, runs = recipe.teachers[name], []
    start = _teacher_start(recipe, options, name)
    for stage, given in ({} if isinstance(model, str) else model.get("train", {})).items():
        runs.append(_run(options, stage, start, 0, given))
        start = runs[-1].options.output
    return runs


def _digest(content: dict[str, Any]) -> str:
    return hash_json(content)[:12]


def _check(recipe: Recipe, options: AblateOptions, jobs: list[_Job]) -> None:
    """Check everything that can be checked before any work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the table's plot is drawn with matplotlib: pip install 'switchkd[viz]'") from None
    small_models.check_small_models(recipe.easy_vqa, {**recipe.teachers, **recipe.students})
    runs = [run for job in jobs for run in job.runs]
    for run in runs:
        if not options.launch:
            run.options.accumulated(processes=1)
        if run.cache is not None:
            check_available(run.cache.backend, run.cache.device)
        if run.options.template is not None:
            load_template(run.options.template)
    needed = {path for o in [r.options for r in runs] + [jobs[0].evaluation] for path in (o.data, o.images) if path}
    made = options.workdir / "easy-vqa"
    for path in sorted(needed):
        if not path.exists() and not (recipe.easy_vqa is not None and path.is_relative_to(made)):
            raise DataError(f"recipe {recipe.name}: there is no {path}")
    for path in sorted({run.options.student for run in runs} | {job.evaluation.model for job in jobs}):
        if not path.is_relative_to(options.workdir) and not (path / "config.json").is_file():
            raise CheckpointError(
                f"recipe {recipe.name}: no checkpoint at {path}: expected a folder with a config.json"
            )


def _prepare(recipe: Recipe, options: AblateOptions) -> None:
    """Create data and untrained models of a small recipe, and check that students fit their teachers before any training."""
    if recipe.easy_vqa is not None:
        small_models.write_small_data(options.workdir / "easy-vqa", recipe.easy_vqa)
    models = options.workdir / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name in recipe.teachers:
        small_models.write_untrained(_teacher_start(recipe, options, name), recipe.teachers[name], seed=0)
    fits: set[tuple[Path, Path, bool]] = set()
    for cell in recipe.cells:
        student = small_models.untrained_path(models, cell.student, recipe.students[cell.student], cell.seed)
        small_models.write_untrained(student, recipe.students[cell.student], cell.seed)
        if cell.teacher is not None:
            fits.add((_teacher_start(recipe, options, cell.teacher), student, cell.switch))
    opened = {path: open_checkpoint(path) for pair in fits for path in pair[:2]}
    for teacher, student, switch in sorted(fits):
        check_compatible(opened[teacher], opened[student], switch)


def _finish(job: _Job, options: AblateOptions, watch: Stopwatch) -> float:
    """Run the remaining steps of a job, write its result, and return its accuracy."""
    for run in job.runs:
        if run.cache is not None:
            with watch.timing(f"cache {Path(str(run.cache.out)).name}"):
                cache_teacher(run.cache)
        if not (run.options.output / SUMMARY).is_file():
            with watch.timing(run.name):
                _train(run, options)
    with watch.timing(f"eval {job.evaluation.output.name}"):
        scores = evaluate(job.evaluation)
    result = Result(
        cell=None if job.cell is None else asdict(job.cell),
        name=job.name,
        accuracy=scores.accuracy,
        by_type=scores.by_type,
        questions=scores.questions,
        seconds=sum(watch.seconds.get(run.name, 0.0) for run in job.runs),
        runs=[str(run.options.output) for run in job.runs],
    )
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.result, json.dumps(asdict(result), indent=1))
    return scores.accuracy


def _train(run: _Run, options: AblateOptions) -> None:
    if not options.launch:
        train(run.options)
        return
    # `switchkd train` in separate processes; a launcher such as torchrun starts as many as its options request.
    file = run.options.output.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in to_plain(run.options).items() if value is not None}
    write_atomically(file, yaml.safe_dump(given, sort_keys=False))
    done = subprocess.run([*options.launch, "train", "--config", str(file)], check=False)
    if done.returncode:
        raise RunError(
            f"training {run.options.output} ended with exit code {done.returncode}, see above; run the same command again to go on"
        )


def _results(jobs: list[_Job]) -> list[Result]:
    """Read the finished results; teachers first, then cells in the order of the matrix."""
    return [Result(**json.loads(job.result.read_text())) for job in jobs if job.result.is_file()]
