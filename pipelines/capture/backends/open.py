"""Loading of a teacher in a backend given by name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from switchkd.errors import ConfigError
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.capture.backends.base import Backend, require_vllm
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend


def check_available(backend: str, device: str) -> None:
    """Check that this machine has the backend and device that a capture requests.

    Args:
        backend: "transformers" or "vllm". device: of the transformers backend, a device name of torch; "auto" is left to Ray.

    Raises:
        ConfigError: the backend is not installed, or the device does not exist; the message explains what to do.
    """
    if backend == "vllm":
        require_vllm()
        return  # touching a device here would keep vLLM's processes from forking
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def open_backend(
    name: str,
    checkpoint: Checkpoint,
    dtype: str,
    *,
    device: str,
    max_length: int,
    tensor_parallel: int = 1,
    vllm_options: Mapping[str, Any] | None = None,
    before_engine: Callable[[], None] = lambda: None,
) -> Backend:
    """Load the teacher.

    Args:
        name: "transformers" or "vllm". dtype: "float32", "bfloat16" or "float16".
        device: of the transformers backend; vLLM selects its own. max_length: in tokens, image tokens included.
        tensor_parallel: devices that share one teacher; vLLM only. vllm_options: further arguments of vLLM's engine.
        before_engine: see `VllmBackend`.

    Raises:
        CheckpointError: the weights cannot be loaded.
        ConfigError: vLLM cannot start.
    """
    if name == "vllm":
        from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend

        return VllmBackend(checkpoint, dtype, max_length, tensor_parallel, dict(vllm_options or {}), before_engine)
    return TransformersBackend(checkpoint, device, dtype)
