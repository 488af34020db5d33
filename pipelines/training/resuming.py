"""What a run that was begun means for the same command: its result if it is finished, else the options that it chose.

Read without torch, so that a finished run is told at once.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import SUMMARY, check_record, read_record, to_plain
from switchkd.pipelines.training.lifecycle.begun import has_begun
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions

# Options that are chosen by what is there, if they are not given, and then stay those of the run.
CHOSEN = ("precision", "group_by", "switch")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """The result of a run."""

    output: Path
    steps: int
    samples: int  # usable
    skipped: dict[str, int]  # by reason
    losses: dict[str, float]  # mean over the last logged interval, nats per position
    already_finished: bool


def finished(options: TrainOptions) -> TrainSummary | None:
    """Return the result of a finished run; None if it is not finished.

    Args:
        options: with batch sizes as numbers, see `resolve_batches`.

    Raises:
        ConfigError: the run was begun with other options.
    """
    run = options.output
    if not (run / SUMMARY).is_file():
        return None
    check_record(run, to_plain(options), RESUMABLE_CHANGES)
    found = json.loads((run / SUMMARY).read_text())
    return TrainSummary(run, found["steps"], found["samples"], found["skipped"], found["losses"], already_finished=True)


def as_begun(options: TrainOptions) -> TrainOptions:
    """Return the options with what a begun run chose for those that are not given."""
    before = read_record(options.output) if has_begun(options.output) else {}
    found = {name: before[name] for name in CHOSEN if getattr(options, name) is None and before.get(name) is not None}
    return replace(options, **found)


def resolve_batches(options: TrainOptions, processes: int) -> TrainOptions:
    """Return the options with accumulation and global batch as numbers.

    A resumed run keeps its global batch. If the number of processes has changed, the accumulation is computed again to match.

    Raises:
        ConfigError: the global batch cannot be made of these processes and batch sizes, or is not that of the run.
    """
    before = read_record(options.output) if has_begun(options.output) else {}
    accumulation = options.accumulated(processes)
    asked = options.batch_size * accumulation * processes
    wanted = options.global_batch or int(before.get("global_batch") or asked)
    if asked != wanted:
        if options.accumulation not in (None, before["accumulation"]):
            raise ConfigError(
                f"{options.output} was begun with {counted(wanted, 'sample')} a step; {counted(processes, 'process')} x batch size "
                f"{options.batch_size} x accumulation {options.accumulation} make {asked}. Choose numbers that make {wanted}"
            )
        accumulation = replace(options, global_batch=wanted, accumulation=None).accumulated(processes)
        log.info("accumulation %d: a step of this run has %s", accumulation, counted(wanted, "sample"))
    return replace(options, accumulation=accumulation, global_batch=wanted)
