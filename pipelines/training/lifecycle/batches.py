"""The number of samples in a step of a run: that of its options, or that of the run that is resumed."""

import logging
from dataclasses import replace

from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import read_record
from switchkd.pipelines.training.lifecycle.begun import has_begun
from switchkd.pipelines.training.options import TrainOptions

log = logging.getLogger(__name__)


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
                f"{options.output} was begun with {wanted} samples a step; {processes} processes x batch size "
                f"{options.batch_size} x accumulation {options.accumulation} make {asked}. Choose numbers that make {wanted}"
            )
        accumulation = replace(options, global_batch=wanted, accumulation=None).accumulated(processes)
        log.info("accumulation %d: a step of this run has %d samples", accumulation, wanted)
    return replace(options, accumulation=accumulation, global_batch=wanted)
