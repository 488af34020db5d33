"""`switchkd ablate`: train and evaluate every cell of a recipe's matrix with shared stores, and write a table of scores.

Every result is named by a hash of its inputs, see `plan.py`: the same command again does only what is missing. A teacher is cached
once per data file that is distilled. What can be checked is checked before any work, see `checks.py`.
"""

import json
import logging
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from switchkd.errors import InUse, RunError
from switchkd.pipelines.ablation.checks import check, prepare
from switchkd.pipelines.ablation.comparisons import write_comparisons
from switchkd.pipelines.ablation.evaluation import Evaluation, evaluate
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.plan import Job, Run, plan_jobs
from switchkd.pipelines.ablation.recipe import read_recipe
from switchkd.pipelines.ablation.table import Result, write_report
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import SUMMARY, to_plain, write_atomically
from switchkd.pipelines.stopwatch import Stopwatch
from switchkd.pipelines.training.lifecycle.lock import one_run
from switchkd.pipelines.training.train import train

POLL_SECONDS = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablation:
    """The result of an ablation."""

    table: str  # Markdown
    files: tuple[Path, ...]
    cells: int
    done_before: int
    left: int = 0  # not finished, because the time was up or another process has them
    elsewhere: int = 0  # of those, cells that another process has


def ablate(options: AblateOptions) -> Ablation:
    """Run the unfinished jobs of a recipe, and write its table.

    Several processes may work in one folder: a cell that another one has is left to it, also if it has a run that the cell needs.

    Raises:
        InputError: something in the recipe cannot be used; all of it is checked before any work.
        RunError: a training run failed; what is finished stays finished.
    """
    recipe = read_recipe(options.recipe, options.settings, options.workdir)
    jobs = list(plan_jobs(recipe, options))
    check(recipe, options, jobs)
    with _in_turn(options.workdir / "prepare.lock"):
        prepare(recipe, options, jobs)
    watch, start = Stopwatch(options.workdir / "seconds.json"), time.monotonic()
    before = sum(job.result.is_file() for job in jobs)
    files: tuple[Path, ...] = ()
    held: list[Job] = []
    with Progress(recipe.name, len(jobs), "cells", done=before, bar=False) as progress:
        for job in jobs:
            if job.result.is_file():
                continue
            if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                break
            log.info("cell %d of %d: %s", progress.done + 1, len(jobs), job.name)
            try:
                with one_run(job.result.with_suffix(".lock"), first=True):
                    if job.result.is_file():
                        continue  # finished by another process since
                    found = _finish(job, options, watch)
            except InUse as error:
                log.info("left to another process: %s", error)
                held.append(job)
                continue
            files = write_report(options.workdir, recipe, _results(jobs), final=False)
            progress.advance(1, note=f"{job.name}: {found.measure} {found}")
    results = _results(jobs)
    files = write_report(options.workdir, recipe, results, final=bool(results))
    left = len(jobs) - len(results)
    if recipe.compare is not None and not left:
        files += (write_comparisons(options.workdir, recipe, jobs),)
    return Ablation(
        "\n".join(path.read_text() for path in files if path.suffix == ".md"),
        files,
        len(jobs),
        before,
        left,
        sum(not job.result.is_file() for job in held),
    )


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Hold a lock, after waiting for the process that has it: what is made here is made once."""
    waited = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(one_run(folder, first=True))
                break
            except InUse as held:
                if not waited:
                    log.info("waiting for another process, which makes what is needed here: %s", held)
                waited = True
                time.sleep(POLL_SECONDS)
        yield


def _finish(job: Job, options: AblateOptions, watch: Stopwatch) -> Evaluation:
    """Run the remaining steps of a job, write its result, and return its evaluation."""
    for run in job.runs:
        if run.cache is not None:
            store = Path(str(run.cache.out))
            with _in_turn(store.with_suffix(".lock")), watch.timing(f"cache {store.name}"):
                cache_teacher(run.cache)
        if not (run.options.output / SUMMARY).is_file():
            with watch.timing(run.name):
                _train(run, options)
    with watch.timing(f"eval {job.evaluation.output.name}"):
        found = evaluate(job.evaluation)
    result = Result(
        cell=None if job.cell is None else asdict(job.cell),
        name=job.name,
        accuracy=found.value,
        by_type=dict(found.parts),
        questions=found.questions,
        seconds=sum(watch.seconds.get(run.name, 0.0) for run in job.runs),
        runs=[str(run.options.output) for run in job.runs],
        measure=found.measure,
    )
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.result, json.dumps(asdict(result), indent=1))
    return found


def _train(run: Run, options: AblateOptions) -> None:
    if not options.launch:
        train(run.options)
        return
    with one_run(run.options.output, first=True):
        pass  # raises InUse, which could not be told from the exit code below
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


def _results(jobs: list[Job]) -> list[Result]:
    """Read the finished results; teachers first, then cells in the order of the matrix."""
    return [Result(**json.loads(job.result.read_text())) for job in jobs if job.result.is_file()]
