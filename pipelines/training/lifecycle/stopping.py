"""Stopping at the end of a step: signals of a scheduler, and checkpoints by the clock."""

import atexit
import logging
import multiprocessing.util  # it ends child processes at exit; what is registered after it runs before it
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from switchkd.errors import Stopped

# What schedulers send before they take a machine back: both end the run after a checkpoint.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
log = logging.getLogger(__name__)


class StopRequest:
    """Whether a signal asked the run to end. While steps run, a signal is only noted; before, it ends the process."""

    def __init__(self) -> None:
        self.signal: str | None = None  # its name
        self.steps_run = False

    def handle(self, number: int, _frame: Any) -> None:
        """Note a signal, or end the process if there is nothing to save."""
        self.signal = signal.Signals(number).name
        if not self.steps_run:
            raise _EndNow


class _EndNow(BaseException):
    """Ends the run from a signal handler; no `except Exception` of a library takes it for a failure of its own."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle `SIGNALS` until the end of the block; outside of a process's main thread, which gets no signals, nothing changes.

    Raises:
        Stopped: a signal came while no step could be finished and saved.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    except _EndNow:
        raise Stopped(f"stopped by {request.signal} before a step was done; run the same command again") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopping(TrainerCallback):
    """Ends the run after the step in which a signal came to any process, and saves after `save_minutes` minutes.

    All processes agree after each step, by two numbers over gloo, which waits for no GPU.
    """

    def __init__(self, request: StopRequest, save_minutes: float | None) -> None:
        self.request, self.save_seconds = request, None if save_minutes is None else 60 * save_minutes
        self.group: Any = None
        self.stopped_at: int | None = None  # the step after which the run ends, before its last

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()
        if args.world_size > 1:
            self.group = dist.new_group(backend="gloo")
        self.request.steps_run = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        first = args.process_index == 0  # by whose clock all of them save
        due = first and self.save_seconds is not None and time.monotonic() - self.saved >= self.save_seconds
        wishes = torch.tensor([self.request.signal is not None, due], dtype=torch.uint8)
        if self.group is not None:
            dist.all_reduce(wishes, dist.ReduceOp.MAX, self.group)
        stop, save = wishes.tolist()
        if save:
            control.should_save = True
        if stop and state.global_step < state.max_steps:
            if first:
                log.warning("%s: saving after step %d", self.request.signal or "a signal", state.global_step)
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def require_end(self, run: Any) -> None:
        """Raise Stopped if the run ended before its last step."""
        if self.stopped_at is not None:
            raise Stopped(
                f"stopped by {self.request.signal or 'a signal to another process'} after step {self.stopped_at}, which is "
                f"saved in {run}; run the same command again to go on"
            )


def leave_group() -> None:
    """Leave the group of processes: one that exits while threads of gloo wait for others is aborted by its own C++ runtime."""
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def begin_worker(worker: int, num_workers: int, rank: int) -> None:
    """Seed a loader process, and let it outlive the first signal of a scheduler that signals every process of a job.

    The run needs its loaders to finish the step. A second signal ends them, so that one that hangs can be removed; and
    `_end_loaders` ends those that are left when the run's process exits.
    """
    seed_worker(worker, num_workers, rank)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


_processes: weakref.WeakSet[Any] = weakref.WeakSet()  # those of every `RunLoader`


class RunLoader(DataLoader[Any]):
    """A loader whose processes, as many as the run's arguments say, begin with `begin_worker` and do not outlive that of the run.

    Args:
        arguments: the run's `TrainingArguments`. options: further arguments of torch's class.
    """

    def __init__(self, dataset: Any, arguments: Any, **options: Any) -> None:
        workers = arguments.dataloader_num_workers
        super().__init__(
            dataset,
            num_workers=workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            worker_init_fn=partial(begin_worker, num_workers=workers, rank=arguments.process_index),
            **options,
        )

    def __iter__(self) -> Any:
        """Start the loader's processes; see torch's class."""
        iterator = super().__iter__()
        _processes.update(getattr(iterator, "_workers", ()))
        return iterator


@atexit.register
def _end_loaders() -> None:
    """End loader processes that outlive their loop, as after an error whose traceback holds the loader.

    Python itself sends each of them one SIGTERM, which `begin_worker` lets it survive, and then waits for it without limit.
    """
    loaders = [process for process in multiprocessing.active_children() if process in _processes]
    if loaders:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a loader that is killed
    for process in loaders:
        process.kill()
