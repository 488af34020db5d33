"""A function over many items in several processes, in order, without torch: its data loader costs seconds to import."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from switchkd.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items for each process that are handed out before their results are taken
PARENT_SECONDS = 5.0  # between two looks whether the parent still exists

_work: Callable[[Any], Any]


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `work(item)` for every item in order, computed in `workers` processes (0: in this one).

    Args:
        work: sent to each process once; may be forked, else it must pickle.

    Raises:
        RunError: a process died. What `work` raises.
    """
    if workers == 0:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(work, os.getpid()))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_do, item))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that inspected samples died; the system kills the largest when memory runs out, so try fewer --workers. "
            "What was finished is kept: run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process if its parent was killed, which does not close the queues between them."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
