"""Capture with vLLM: its engine schedules the teacher's forward passes; our pooler packs supervised positions on their device.

The engine gets expanded token ids and the pixels of our own encoder and does not use vLLM's processors, so both backends and the
trainer have bit-identical input, whatever image library vLLM's environment has. The response is checked against the request: the
prompt's ids, and the number of rows.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch

from switchkd.data.encoded import EncodedSample
from switchkd.errors import CheckpointError, RunError
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.capture.backends.base import Backend, BackendFailed
from switchkd.pipelines.capture.backends.packed_rows import unpack
from switchkd.pipelines.capture.backends.vllm_plugin import ARCHITECTURE
from switchkd.pipelines.capture.backends.vllm_pooler import Runs, request_options
from switchkd.stores import Manifest, Payload

WATCH_SECONDS = 0.5  # between two checks that the engine's process is alive

# Set before vLLM is imported, since it reads them on import. By default vLLM reports usage statistics over the network.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class VllmBackend(Backend):
    """A teacher in a vLLM engine.

    Args:
        dtype: "float32", "bfloat16" or "float16". max_length: tokens of the longest sample.
        tensor_parallel: devices that share the teacher. options: further arguments of `vllm.EngineArgs`.

    Raises:
        CheckpointError: a teacher that vLLM's Llava does not support.
        RunError: the engine does not start.
    """

    ahead = 3

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        max_length: int,
        tensor_parallel: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        kind, layer = checkpoint.config.model_type, checkpoint.config.vision_feature_layer
        if kind != "llava" or not isinstance(layer, int):
            raise CheckpointError(
                f"{checkpoint.path} is a {kind!r} with vision feature layer {layer}; vLLM takes a 'llava' with one layer: "
                "use --backend transformers"
            )
        self.checkpoint = checkpoint
        self.dtype = getattr(torch, dtype)
        self.max_length = min(max_length, checkpoint.config.text_config.max_position_embeddings)
        self.engine = _start_engine(
            {
                "model": str(checkpoint.path),
                "runner": "pooling",
                "hf_overrides": {"architectures": [ARCHITECTURE], "head_dtype": "float32"},
                "dtype": dtype,
                "max_model_len": self.max_length,
                "tensor_parallel_size": tensor_parallel,
                "trust_remote_code": checkpoint.trust_remote_code,
                "enable_prefix_caching": True,
                "limit_mm_per_prompt": {"image": 1},
                "mm_processor_cache_gb": 0,  # requests are already processed
                "disable_log_stats": True,
                **(options or {}),
            }
        )
        self._names = count()
        self._done: dict[str, Any] = {}

    def capture(self, samples: Sequence[EncodedSample], manifest: Manifest) -> list[Payload]:
        """Run the teacher over samples. Raises RunError."""
        return self.finish(self.start(samples, manifest))

    def start(self, samples: Sequence[EncodedSample], manifest: Manifest) -> Any:
        """Queue one request per sample. Raises RunError."""
        return [(sample, self._add(sample, manifest, cached_prefix=True)) for sample in samples], manifest

    def finish(self, started: Any) -> list[Payload]:
        """Run the engine until these requests are done, and check its output. Raises RunError."""
        requests, manifest = started
        rows = [self._wait(name, sample) for sample, name in requests]
        # A prefix from vLLM's cache has no hidden states: if it overlaps an answer, the request runs again without the cache.
        for index, (sample, _) in enumerate(requests):
            if len(rows[index]) < sample.positions:
                rows[index] = self._wait(self._add(sample, manifest, cached_prefix=False), sample)
            if len(rows[index]) != sample.positions:
                raise RunError(f"vLLM gave {len(rows[index])} rows for {sample.positions} positions")
        return unpack(torch.cat(rows), manifest.top_k).split([sample.positions for sample, _ in requests])

    def _add(self, sample: EncodedSample, manifest: Manifest, cached_prefix: bool) -> str:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        from switchkd.pipelines.capture.backends.vllm_model import image_input

        ids: list[int] = sample.input_ids.tolist()
        if len(ids) > self.max_length:
            raise RunError(f"{len(ids)} tokens, and the teacher has {self.max_length} positions under vLLM")
        checkpoint = self.checkpoint
        prompt = (
            tokens_input(ids)
            if sample.pixels is None
            else image_input(
                ids,
                sample.pixels.to(self.dtype),
                checkpoint.image_token_id,
                checkpoint.image_tokens,
                f"{sample.digest.image:016x}",
            )
        )
        how = request_options(
            predicting_runs(sample.supervised), manifest.vocab_rows, manifest.top_k, manifest.has_hidden
        )
        params = PoolingParams(task="token_embed", extra_kwargs=how, skip_reading_prefix_cache=not cached_prefix)
        name = str(next(self._names))
        with _engine_alive():
            self.engine.add_request(name, prompt, params)
        return name

    def _wait(self, name: str, sample: EncodedSample) -> torch.Tensor:
        """Return the rows of one request."""
        while name not in self._done:
            with _engine_alive():
                finished = self.engine.step()
            self._done |= {output.request_id: output for output in finished}
        output = self._done.pop(name)
        if output.prompt_token_ids != sample.input_ids.tolist():
            raise RunError("vLLM ran other token ids than it was given")
        rows: torch.Tensor = output.outputs.data
        return rows


def predicting_runs(supervised: np.ndarray) -> Runs:
    """Return the runs of rows that predict a supervised token: [L] bool → [(begin, end), …], see positions.py for the shift."""
    wanted = np.flatnonzero(supervised[1:])
    breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks) if len(run)]


@contextmanager
def _engine_alive() -> Iterator[None]:
    """Raise BackendFailed if the engine's process has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise BackendFailed(
            "vLLM's engine died, its log above may say why; what was committed is whole, run the same command again"
        ) from error


def _start_engine(arguments: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine

    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (ValueError, RuntimeError, TypeError) as error:
        raise RunError(f"vLLM does not start: {error}") from error
    # Runs before multiprocessing ends the engine's processes, which vLLM would report as an unexpected exit.
    atexit.register(engine.engine_core.shutdown)
    _wake_when_dead(engine.engine_core)
    return engine


def _wake_when_dead(core: Any) -> None:
    """End the wait for an engine process that died: vLLM notes its death, but does not wake a caller that waits for output."""
    if not hasattr(core, "outputs_queue"):
        return  # an engine inside this process
    from vllm.v1.engine.exceptions import EngineDeadError

    reference = weakref.ref(core)

    def watch() -> None:
        while (found := reference()) is not None:
            if found.resources.engine_dead:
                found.outputs_queue.put_nowait(EngineDeadError())
                return
            del found
            time.sleep(WATCH_SECONDS)

    threading.Thread(target=watch, daemon=True, name="switchkd-engine-watch").start()
