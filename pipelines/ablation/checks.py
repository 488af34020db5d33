"""The checks of an ablation before any work: what a command of its own would refuse at its start is refused here, for all of them.

A run may begin days after the first one. So each recipe entry's options are checked as `train`, `cache-teacher` and `eval` check
them: against each other, this machine, transformers' arguments, the checkpoints, the data files and the store that will be there.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from switchkd.data.files import check_folder
from switchkd.data.load_template import CHECKPOINT_TEMPLATE, load_template
from switchkd.data.samples import SampleFile
from switchkd.errors import CheckpointError, ConfigError, DataError
from switchkd.models.checkpoint import Checkpoint, open_checkpoint
from switchkd.models.families import family_of
from switchkd.pipelines.ablation import small_models
from switchkd.pipelines.ablation.comparisons import require_statistics
from switchkd.pipelines.ablation.evaluation import check_tasks
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.plan import Job, Run, naming
from switchkd.pipelines.ablation.recipe import Recipe
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.options import DEFAULT_PAYLOAD, CacheOptions
from switchkd.pipelines.capture.ray_engine import require_ray
from switchkd.pipelines.evaluation.benchmarks.run import read_tasks
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions
from switchkd.pipelines.training.arguments import training_arguments
from switchkd.pipelines.training.cross_tokenizer import check_vocab_map
from switchkd.pipelines.training.inputs import check_models, resolve_options
from switchkd.pipelines.training.int8_teacher import check_int8
from switchkd.pipelines.training.joining import choose_payload
from switchkd.pipelines.training.model_setup import make_switch_adapter
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.parallelism import profile_arguments

# How torchrun and accelerate are told the number of processes, of one machine and of machines.
_PROCESSES = re.compile(r"--(?:nproc[-_]per[-_]node|num[-_]processes)[ =](\d+)")
_MACHINES = re.compile(r"--nnodes[ =](\d+)")


def check(recipe: Recipe, options: AblateOptions, jobs: Sequence[Job]) -> None:
    """Check everything that can be checked without a model or a data file being made or read.

    Raises:
        InputError: names the recipe's entry.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the table's plot is drawn with matplotlib: pip install 'switchkd[viz]'") from None
    small_models.check_small_models(recipe.easy_vqa, recipe.emoji_vqa, {**recipe.teachers, **recipe.students})
    if recipe.compare is not None:
        require_statistics()
    runs = _runs(jobs)
    evaluation = jobs[0].evaluation
    with naming(f"recipe {recipe.name}: evaluate"):
        check_available("transformers", evaluation.device)
        _check_template(evaluation.template)
        if isinstance(evaluation, BenchmarkOptions):
            check_tasks(evaluation)
    for run in runs:
        with naming(f"recipe {recipe.name}: {run.entry}"):
            _check_template(run.options.template)
            _check_training(run.options, options.launch)
            if run.cache is not None:
                _check_capture(run.cache, run.options)
    _check_paths(recipe, options, jobs)


def _runs(jobs: Sequence[Job]) -> list[Run]:
    """Return the different runs of all jobs."""
    return list({run.name: run for job in jobs for run in job.runs}.values())


def _data_files(jobs: Sequence[Job]) -> set[tuple[Path, Path | None]]:
    """Return the data files of all runs and of the evaluation, each with its image folder."""
    evaluation = jobs[0].evaluation
    read = {(run.options.data, run.options.images) for run in _runs(jobs)}
    return read | ({(evaluation.data, evaluation.images)} if isinstance(evaluation, EvalOptions) else set())


def _check_paths(recipe: Recipe, options: AblateOptions, jobs: Sequence[Job]) -> None:
    """Raise DataError or CheckpointError for a data file, image folder or checkpoint that is missing and will not be made."""
    runs = _runs(jobs)
    needed = {path for data in _data_files(jobs) for path in data if path}
    given = {"easy-vqa": recipe.easy_vqa, "emoji-vqa": recipe.emoji_vqa}
    made = [options.workdir / name for name, entry in given.items() if entry is not None]
    for path in sorted(needed):
        if not path.exists() and not any(path.is_relative_to(folder) for folder in made):
            raise DataError(f"recipe {recipe.name}: there is no {path}")
    models = {run.options.student for run in runs} | {job.evaluation.model for job in jobs if job.evaluation.model}
    for path in sorted(models):
        if not path.is_relative_to(options.workdir) and not (path / "config.json").is_file():
            raise CheckpointError(
                f"recipe {recipe.name}: no checkpoint at {path}: expected a folder with a config.json"
            )


def _check_template(template: str | None) -> None:
    if template != CHECKPOINT_TEMPLATE:  # the checkpoint's own needs the checkpoint, see `prepare`
        load_template(template)


def _check_training(options: TrainOptions, launch: Sequence[str]) -> None:
    """Check a run's options as `train` does before it reads a sample, in as many processes as `launch` starts."""
    check_int8(options)
    processes = processes_of(launch)
    # Where only the launcher knows the number, that batches fit is checked when it has started.
    alone = replace(options, global_batch=None, accumulation=1)
    if processes is not None:
        alone = resolve_options(options, processes)
    if launch:
        profile_arguments(options.profile, {"LOCAL_RANK": "0"})
        alone = replace(alone, profile="ddp")  # sharding cannot be set up outside of those processes
    training_arguments(alone)


def processes_of(launch: Sequence[str]) -> int | None:
    """Return how many processes a launcher's words start; None if they do not say so."""
    if not launch:
        return 1
    words = " ".join(launch)
    found, machines = _PROCESSES.search(words), _MACHINES.search(words)
    return None if found is None else int(found[1]) * (int(machines[1]) if machines else 1)


def _check_capture(cache: CacheOptions, options: TrainOptions) -> None:
    """Check a store's options as `cache-teacher` does, and that the run can read what the store will hold."""
    with naming("cache"):
        check_available(cache.backend, cache.device)
        if cache.engine == "ray":
            require_ray()
        _check_template(cache.template)
    payload = cache.payload or DEFAULT_PAYLOAD
    top_k = cache.k if payload in ("topk", "both") else None
    read = choose_payload(options, "the store", top_k, payload in ("hidden", "both"))
    if options.vocab_map and read == "topk":
        raise ConfigError("--vocab-map needs the teacher's whole rows: cache payload hidden or both")


def prepare(recipe: Recipe, options: AblateOptions, jobs: Sequence[Job]) -> None:
    """Create data and untrained models of a small recipe; then check data files and models, before any training.

    Raises:
        InputError: names the recipe's entry.
        ReadFailure: an image folder cannot be read.
    """
    if recipe.easy_vqa is not None:
        small_models.write_small_data(options.workdir / "easy-vqa", recipe.easy_vqa)
    if recipe.emoji_vqa is not None:
        small_models.write_emoji_vqa(options.workdir / "emoji-vqa", recipe.emoji_vqa)
    suite = "easy-vqa" if recipe.emoji_vqa is None else "emoji-vqa"
    models = options.workdir / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name, model in recipe.teachers.items():
        path = small_models.untrained_path(models, name, model, seed=0)
        small_models.write_untrained(path, model, 0, suite)
    for cell in recipe.cells:
        model = recipe.students[cell.student]
        path = small_models.untrained_path(models, cell.student, model, cell.seed)
        small_models.write_untrained(path, model, cell.seed, suite)
    opened = cache(open_checkpoint)
    seen: set[tuple[object, ...]] = set()
    for run in _runs(jobs):
        about = (run.student, run.teacher, repr(replace(run.options, student=Path(), seed=0, output=Path())))
        if about in seen:
            continue
        seen.add(about)
        with naming(f"recipe {recipe.name}: {run.entry}"):
            _check_run(run, opened)
    evaluation = jobs[0].evaluation
    if isinstance(evaluation, BenchmarkOptions):
        with naming(f"recipe {recipe.name}: evaluate"):
            read_tasks(evaluation)
    for data, images in sorted(_data_files(jobs), key=str):
        with naming(f"recipe {recipe.name}: {data}"):
            _check_data(data, images)


def _check_run(run: Run, opened: Callable[..., Checkpoint]) -> None:
    """Check that a run's student and teacher fit each other, its options and its template."""
    options = run.options
    student = opened(run.student, options.trust_remote_code)
    teacher = None if run.teacher is None else opened(run.teacher, options.trust_remote_code)
    check_models(options, student, teacher)
    check_vocab_map(options, teacher, None)
    # Other families' widths were compared above.
    if options.switch_adapter is not None and teacher is not None and family_of(student.config).is_llava:
        make_switch_adapter(options, teacher, student)
    template = options.template if run.cache is None else run.cache.template
    if template in (None, CHECKPOINT_TEMPLATE):
        load_template(template, student if run.cache is None else teacher)


def _check_data(data: Path, images: Path | None) -> None:
    """Check that a data file can be read and that its images' paths start from the image folder."""
    samples = SampleFile(data)
    if images is None and samples.needs_folder():
        raise DataError(f"{data} names images: give images, the folder that their paths start from")
    check_folder(samples, images)
