"""Work that the first process of a run does for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from switchkd.errors import RunError, SwitchKDError

T = TypeVar("T")


def from_first_process(make: Callable[[], T]) -> T:
    """Return what `make` returns in the first process; the others receive it. Every process of the run calls it.

    Raises:
        SwitchKDError: in the first process, what `make` raises.
        RunError: in the others, where it did.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return make()
    failure: SwitchKDError | None = None
    sent: list[Any] = [None, True]
    if dist.get_rank() == 0:
        try:
            sent = [make(), False]
        except SwitchKDError as error:
            failure = error
    dist.broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    made, failed = sent
    if failed:
        raise RunError("the first process stopped before the first step, see its message")
    result: T = made
    return result
