"""Options of stage one."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from switchkd.data.images import MAX_IMAGE_PIXELS
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.backends.base import require_backend
from switchkd.stores.layout import HIDDEN_DTYPES, PAYLOADS
from switchkd.stores.storage.base import StoreLocation


@dataclass(frozen=True)
class CacheOptions:
    """What `switchkd cache-teacher` was asked for; fields are its options."""

    teacher: Path
    data: Path
    out: StoreLocation
    images: Path | None = None
    template: str = "qwen2_base"
    backend: str = "transformers"  # or "vllm"
    payload: str = "topk"  # or "hidden", "both"
    k: int = 128
    fine: float = 0.004  # steps of the stored logits, see stores/codec.py
    coarse: float = 0.125
    hidden_dtype: str = "float16"  # or "bfloat16", "int8"
    part_size: int = 512
    batch_size: int = 16
    max_length: int = 2048
    image_mode: str = "own"  # or "square", "pad"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    device: str = "cpu"  # of the transformers backend; vLLM finds its own. "auto", with Ray: what an actor is given
    tensor_parallel: int = 1  # devices that share one teacher; vLLM only
    vllm_options: tuple[tuple[str, Any], ...] = ()  # further arguments of vLLM's engine, by name
    dtype: str = "auto"
    workers: int = 0
    shard: tuple[int, int] = (0, 1)
    engine: str = "local"  # or "ray"
    actors: int | None = None  # of Ray; None takes one a device
    strict: bool = False
    trust_remote_code: bool = False


def check_options(options: CacheOptions) -> None:
    """Refuse options that cannot work, before anything is opened. Raises ConfigError."""
    index, count = options.shard
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: the first number runs from 0 to {count - 1}")
    if PurePosixPath(str(options.out)).suffix != ".zarr":
        raise ConfigError(f"a store's name ends in .zarr, got {options.out}")
    for name in ("k", "part_size", "batch_size", "max_length", "tensor_parallel"):
        if getattr(options, name) < 2 - (name != "k"):
            raise ConfigError(f"{name} is too small: {getattr(options, name)}")
    if not 0 < options.fine <= options.coarse:
        raise ConfigError(f"0 < fine <= coarse is needed, got fine = {options.fine:g}, coarse = {options.coarse:g}")
    for name, words in (("payload", PAYLOADS), ("hidden_dtype", HIDDEN_DTYPES)):
        if getattr(options, name) not in words:
            raise ConfigError(f"{name} is one of {', '.join(words)}, got {getattr(options, name)!r}")
    require_backend(options.backend)
    if options.engine == "ray" and options.shard != (0, 1):
        raise ConfigError("--engine ray hands out the parts itself: leave out --shard")
    if options.actors is not None and options.engine != "ray":
        raise ConfigError("--actors is Ray's: add --engine ray")
    if options.backend == "vllm":
        return  # touching a device here would keep vLLM's processes from forking
    if options.tensor_parallel != 1 or options.vllm_options:
        raise ConfigError("--tensor-parallel and --vllm-option are vLLM's: add --backend vllm")
    if options.device == "auto":
        return  # Ray's actors will have one of their own
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
