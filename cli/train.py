"""`switchkd train`: training."""

import logging
import os
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from switchkd.cli.common import config_option, echo, gigabytes, importing, lines_of, quiet_libraries
from switchkd.cli.options import GroupedCommand, GroupedOption, options_of
from switchkd.collector import without_collection
from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.pipelines.given import require_given
from switchkd.pipelines.run_folder import SUMMARY, read_record
from switchkd.pipelines.training.options import SCALE, TrainOptions
from switchkd.settings import absent_terms

if TYPE_CHECKING:
    from switchkd.pipelines.training.resuming import TrainSummary


@click.command("train", cls=GroupedCommand)
@config_option
@options_of(TrainOptions, check_paths=False)
@click.option(
    "--dry-run",
    cls=GroupedOption,
    group=SCALE,
    is_flag=True,
    help="Check everything, and tell memory, FLOPs, hours and disk of the run from configs and data; no weights are loaded, "
    "nothing is trained. Without --cache, as with a store that is still to be made.",
)
@click.option(
    "--devices",
    cls=GroupedOption,
    group=SCALE,
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="With --dry-run: the devices of the run that is planned, of all nodes together.",
)
@click.pass_context
def command(ctx: click.Context, /, dry_run: bool, devices: int, **options: Any) -> None:
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
    if dry_run:
        _print_plan(resolved, devices)
        return
    if ctx.get_parameter_source("devices") is not ParameterSource.DEFAULT:
        raise ConfigError(
            "--devices is for --dry-run; a run has the processes that torchrun starts: --nproc-per-node N"
        )
    # Neither a finished run nor a mistyped path needs torch, whose import takes seconds.
    done = _finished(resolved)
    if done is None:
        require_given(TrainOptions, vars(resolved))
        with without_collection(lasting=True), importing():
            from switchkd.pipelines.training.train import train

        done = train(resolved)
    if not first:
        return
    record = read_record(done.output)
    absent = absent_terms(record.get("objective", ""), record.get("switch", True))
    told = {name.removeprefix("loss_"): value for name, value in done.losses.items() if name not in absent}
    losses = ", ".join(f"{name} {value:.4f}" for name, value in told.items())
    echo(
        f"{done.output}: {'was already trained for' if done.already_finished else 'trained for'} {counted(done.steps, 'step')} on "
        f"{counted(done.samples, 'sample')}; skipped: {lines_of(done.skipped)}"
        + (f"\nlast losses: {losses}" if losses else "")
    )


def _finished(options: TrainOptions) -> "TrainSummary | None":
    """Return the result of a run that is finished; None if there is something to do."""
    from switchkd.pipelines.training.resuming import as_begun, finished, resolve_batches

    if not (options.output / SUMMARY).is_file():
        return None
    return finished(resolve_batches(as_begun(options), int(os.environ.get("WORLD_SIZE", "1"))))


def _print_plan(options: TrainOptions, devices: int) -> None:
    """Print what a run would take; its plan is logged."""
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("--dry-run is one process: leave out torchrun, and pass --devices N for a run of N processes")
    require_given(TrainOptions, vars(options))
    with importing():
        from switchkd.pipelines.training.dry_run import TYPICAL_SHARE, plan

    found = plan(options, devices)
    kinds = ", ".join(f"{name} {gigabytes(size)}" for name, size in found.memory.items() if size)
    again = f", and {_petaflop(found.recomputed_flops)} computed again" if found.recomputed_flops else ""
    rows = {
        "steps": f"{found.steps:,} of {counted(found.global_batch, 'sample')} on {counted(devices, 'device')}",
        "memory": f"about {gigabytes(sum(found.memory.values()))} of each device ({kinds})",
        "compute": f"about {_petaflop(found.step_flops)} a step{again}, from {counted(found.probed_samples, 'sample')}",
        "time": "pass --peak-tflops, what one device can do at this precision",
        "disk": f"about {gigabytes(found.disk_bytes)}: {counted(found.checkpoints, 'checkpoint')} of "
        f"{gigabytes(found.checkpoint_bytes)}, one of them being written, and the student; free {gigabytes(found.free_bytes)}",
    }
    if (peak := options.peak_tflops) is not None:
        at_peak = found.hours(peak, 1.0)
        rows["time"] = (
            f"about {found.hours(peak):,.2f} hours at {TYPICAL_SHARE:.0%} of {peak:,g} TFLOP/s a device ({at_peak:,.2f} at all of "
            "it), of arithmetic alone"
        )
    if not found.has_store:
        rows["store"] = "to be made: `switchkd cache-teacher --dry-run` tells its time and size"
    rows["run"] = f"nothing was written at {options.output}, and no weights were read"
    for name, value in rows.items():
        echo(f"{name:<9}{value}")
    if found.disk_bytes > found.free_bytes:
        echo("The checkpoints would not fit.", err=True)


def _petaflop(flops: float) -> str:
    return f"{flops / 1e15:,.3g} PFLOP" if flops >= 1e13 else f"{flops / 1e9:,.3g} GFLOP"
