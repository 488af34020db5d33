"""Copies of a batch to the device that the host does not wait for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_device(columns: Any, device: torch.device) -> Any:
    """Return the columns of a batch with each tensor in pinned memory on `device`; everything else is as it was.

    The loader pins batches if it loads for a CUDA device. A copy from pinned memory is queued behind the kernels that the device
    has to run, and the host goes on at once; torch keeps the pinned memory from being used again before the copy is done. Tensors
    in other memory are left to the caller, since a copy of them is not safe without a wait. On a CPU this does nothing.

    Args:
        columns: a batch's dict, with dicts, lists and tuples inside it.
    """
    if device.type == "cpu":
        return columns
    if isinstance(columns, Tensor):
        return columns.to(device, non_blocking=True) if columns.is_pinned() else columns
    if isinstance(columns, Mapping):
        return {name: on_device(column, device) for name, column in columns.items()}
    if isinstance(columns, (list, tuple)):
        return type(columns)(on_device(column, device) for column in columns)
    return columns
