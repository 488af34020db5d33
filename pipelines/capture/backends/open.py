"""From the name of a backend to a loaded teacher."""

from collections.abc import Mapping
from typing import Any

from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend


def open_backend(
    name: str,
    checkpoint: Checkpoint,
    dtype: str,
    *,
    device: str,
    max_length: int,
    tensor_parallel: int = 1,
    vllm_options: Mapping[str, Any] | None = None,
) -> Backend:
    """Load the teacher.

    Args:
        name: "transformers" or "vllm". dtype: "float32", "bfloat16" or "float16".
        device: of the transformers backend; vLLM finds its own. max_length: in tokens, image tokens included.
        tensor_parallel: devices that share one teacher; vLLM only. vllm_options: further arguments of vLLM's engine.

    Raises:
        CheckpointError: the weights cannot be loaded.
        RunError: vLLM cannot start.
    """
    if name == "vllm":
        from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend

        return VllmBackend(checkpoint, dtype, max_length, tensor_parallel, dict(vllm_options or {}))
    return TransformersBackend(checkpoint, device, dtype)
