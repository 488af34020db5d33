"""`switchkd train`: training."""

import logging
import os
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from switchkd.cli.common import config_option, echo, importing, lines_of, quiet_libraries
from switchkd.cli.options import GroupedCommand, options_of
from switchkd.collector import without_collection
from switchkd.pipelines.given import require_given
from switchkd.pipelines.run_folder import SUMMARY
from switchkd.pipelines.training.options import TrainOptions

if TYPE_CHECKING:
    from switchkd.pipelines.training.resuming import TrainSummary


@click.command("train", cls=GroupedCommand)
@config_option
@options_of(TrainOptions, check_paths=False)
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Train a student with CE + λ1·Align + λ2·VSD from a teacher store.

    Align reads the store; VSD runs the student's visual features through the teacher's projector and LLM. Run it again to
    continue after an interruption. Under torchrun it trains on all devices. A config file may hold `trainer:`, further
    arguments of transformers' TrainingArguments.
    """
    quiet_libraries()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, only this one prints
    if not first:
        logging.getLogger("switchkd").setLevel(logging.WARNING)
    from switchkd.pipelines.training.stages import with_stage

    if options["stage"] is not None:
        given = {n: v for n, v in options.items() if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT}
        options |= with_stage(options["stage"], given)
    trainer = ctx.obj["trainer"] if ctx.obj else {}
    resolved = TrainOptions(trainer=trainer, **options)
    # Neither a finished run nor a mistyped path needs torch, whose import takes seconds.
    done = _finished(resolved)
    if done is None:
        require_given(TrainOptions, vars(resolved))
        with without_collection(lasting=True), importing():
            from switchkd.pipelines.training.train import train

        done = train(resolved)
    if not first:
        return
    losses = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in done.losses.items())
    echo(
        f"{done.output}: {'was already trained for' if done.already_finished else 'trained for'} {done.steps} steps on "
        f"{done.samples:,} samples; skipped: {lines_of(done.skipped)}" + (f"\nlast losses: {losses}" if losses else "")
    )


def _finished(options: TrainOptions) -> "TrainSummary | None":
    """Return the result of a run that is finished; None if there is something to do."""
    from switchkd.pipelines.training.resuming import as_begun, finished, resolve_batches

    if not (options.output / SUMMARY).is_file():
        return None
    return finished(resolve_batches(as_begun(options), int(os.environ.get("WORLD_SIZE", "1"))))
