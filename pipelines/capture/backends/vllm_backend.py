"""Capture with vLLM: its engine schedules the teacher's forward passes; our pooler packs supervised positions on their device.

Any multimodal class of vLLM can be a teacher (`vllm_model`). The engine gets expanded token ids and the media of our own encoder
and does not use vLLM's processors, so both backends and the trainer have bit-identical input, whatever image library vLLM's
environment has. What vLLM would make of an image is compared once, before the engine starts (`vllm_checks`). Each response is
checked against its request: the prompt's ids, and the number of rows.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from switchkd.data.encoded import EncodedSample
from switchkd.errors import ConfigError, RunError
from switchkd.fingerprints import SampleDigest
from switchkd.library_errors import as_checkpoint_error, is_library_failure, words_of
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.families import family_of, logit_map_of
from switchkd.models.vlm import load_lm_head
from switchkd.pipelines.capture.backends.base import Backend, BackendFailed
from switchkd.pipelines.capture.backends.packed_rows import unpack
from switchkd.pipelines.capture.backends.vllm_checks import (
    StructureProbe,
    architecture_for,
    check_logit_map,
    check_platform,
)
from switchkd.pipelines.capture.backends.vllm_media import split_media
from switchkd.pipelines.capture.backends.vllm_plugin import CAUSE
from switchkd.pipelines.capture.backends.vllm_pooler import Runs, request_options
from switchkd.stores import Manifest, Payload

if TYPE_CHECKING:  # it imports vLLM
    from switchkd.pipelines.capture.backends.vllm_inputs import ItemMaker

PROBE_LOGITS = 16  # of the probe sample, compared with its states
WATCH_SECONDS = 0.5  # between two checks that the engine's process is alive

# Set before vLLM is imported, since it reads them on import. By default vLLM reports usage statistics over the network.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class VllmBackend(Backend):
    """A teacher in a vLLM engine.

    Args:
        dtype: "float32", "bfloat16" or "float16". max_length: tokens of the longest sample.
        tensor_parallel: devices that share the teacher. options: further arguments of `vllm.EngineArgs`.
        before_engine: called after the checks that need no engine, and before it takes the device's memory.

    Raises:
        CheckpointError: a teacher that vLLM does not have, or would run with other results; see `vllm_checks`.
        ConfigError: the engine does not start, as with too little memory or an option that vLLM does not take; or it would not take
            samples of `max_length`.
    """

    ahead = 3

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        max_length: int,
        tensor_parallel: int = 1,
        options: dict[str, Any] | None = None,
        before_engine: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.max_length = min(max_length, checkpoint.config.text_config.max_position_embeddings)
        arguments = {
            "model": str(checkpoint.path),
            "runner": "pooling",
            "hf_overrides": {"architectures": [architecture_for(checkpoint)], "head_dtype": "float32"},
            "dtype": dtype,
            "max_model_len": self.max_length,
            "tensor_parallel_size": tensor_parallel,
            "trust_remote_code": checkpoint.trust_remote_code,
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_processor_cache_gb": 0,  # requests are already processed
            "mm_device_do_normalize": False,  # and their pixels normalised
            "disable_log_stats": True,
            **(options or {}),
        }
        self._item, probe = _checked(checkpoint, arguments)
        _check_length(checkpoint, max_length, options or {})  # after it: what vLLM cannot run at all is told first
        before_engine()
        self.engine = _start_engine(arguments)
        self._names = count()
        self._under_way: set[str] = set()
        self._done: dict[str, Any] = {}
        try:
            self._check_logits(probe, dtype)
        except BaseException:
            self.engine.engine_core.shutdown()
            raise

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
        how = request_options(
            predicting_runs(sample.supervised), manifest.vocab_rows, manifest.top_k, manifest.has_hidden
        )
        return self._request(sample, how, cached_prefix)

    def _request(self, sample: EncodedSample, how: dict[str, Any], cached_prefix: bool) -> str:
        """Queue a sample's request and return its name."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        from switchkd.pipelines.capture.backends.vllm_inputs import image_input

        ids: list[int] = sample.input_ids.tolist()
        if len(ids) > self.max_length:
            raise RunError(f"{len(ids)} tokens, and the teacher has {self.max_length} positions under vLLM")
        prompt = (
            tokens_input(ids)
            if sample.media is None
            else image_input(ids, self._items(sample), self.checkpoint.image_token_id, sample.image_tokens)
        )
        params = PoolingParams(task="token_embed", extra_kwargs=how, skip_reading_prefix_cache=not cached_prefix)
        name = str(next(self._names))
        with self._engine_at_work():
            self.engine.add_request(name, prompt, params)
        self._under_way.add(name)
        return name

    def _items(self, sample: EncodedSample) -> list[Any]:
        """Return vLLM's items of a sample's images."""
        assert sample.media is not None
        images = split_media(sample.media, family_of(self.checkpoint.config), sample.image_tokens)
        return [self._item(image) for image in images]

    def _wait(self, name: str, sample: EncodedSample) -> torch.Tensor:
        """Return the rows of one request."""
        while name not in self._done:
            if name not in self._under_way:
                raise RunError("vLLM gave this sample up when it failed at another one")
            with self._engine_at_work():
                finished = self.engine.step()
            self._done |= {output.request_id: output for output in finished}
            self._under_way -= self._done.keys()
        output = self._done.pop(name)
        if output.prompt_token_ids != sample.input_ids.tolist():
            raise RunError("vLLM ran other token ids than it was given")
        rows: torch.Tensor = output.outputs.data
        return rows

    def _check_logits(self, probe: StructureProbe, dtype: str) -> None:
        """Compare the probe sample's logits with its states through the LM head of the checkpoint. Raises CheckpointError."""
        ids = np.array(probe.ids, np.int32)
        supervised = np.zeros(len(ids), bool)
        supervised[-1] = True
        sample = EncodedSample(
            ids, supervised, probe.media.columns, SampleDigest(0, 0, 0), image_tokens=probe.image_tokens
        )
        top_k = min(PROBE_LOGITS, self.checkpoint.vocab_rows)
        how = request_options(predicting_runs(supervised), self.checkpoint.vocab_rows, top_k, True)
        payload = unpack(self._wait(self._request(sample, how, cached_prefix=False), sample), top_k)
        assert payload.ids is not None and payload.logits is not None and payload.hidden is not None
        head = load_lm_head(self.checkpoint, dtype)[torch.from_numpy(payload.ids).long()]  # [P, K, d]
        product = torch.einsum("pkd,pd->pk", head.float(), torch.from_numpy(payload.hidden))
        logit_map = logit_map_of(self.checkpoint.config, self.checkpoint.path)
        check_logit_map(self.checkpoint.path, logit_map, product, torch.from_numpy(payload.logits))

    @contextmanager
    def _engine_at_work(self) -> Iterator[None]:
        """Convert what the engine raises.

        Raises:
            BackendFailed: its process has died.
            RunError: an engine inside this process failed at a request; all that were under way are given up.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise BackendFailed(
                "vLLM's engine died, its log above may say why; what was committed is whole, run the same command again. With "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 in its environment it names the row at which vLLM fails"
            ) from error
        except Exception as error:
            if not is_library_failure(error):
                raise
            self._give_up()
            raise RunError(f"vLLM fails: {words_of(error)}") from error

    def _give_up(self) -> None:
        """Abort all requests; what a step that failed was to compute, prefixes and features, vLLM holds for computed."""
        self.engine.abort_request([*self._under_way])
        self._under_way.clear()
        self.engine.reset_encoder_cache()
        if not self.engine.reset_prefix_cache():
            raise BackendFailed(
                "vLLM failed at a sample and cannot forget what it left unfinished; run the same command again"
            )


def predicting_runs(supervised: np.ndarray) -> Runs:
    """Return the runs of rows that predict a supervised token: [L] bool → [(begin, end), …], see positions.py for the shift."""
    wanted = np.flatnonzero(supervised[1:])
    breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks) if len(run)]


def _check_length(checkpoint: Checkpoint, max_length: int, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if vLLM would not take samples of `max_length` tokens."""
    positions = checkpoint.config.text_config.max_position_embeddings
    limits = {"--vllm-option max_model_len": options.get("max_model_len"), "the teacher's positions": positions}
    for name, limit in limits.items():
        if isinstance(limit, int) and 0 < limit < max_length:
            raise ConfigError(
                f"samples may have up to {max_length} tokens (--max-length), and vLLM takes {limit} at most, by {name}: pass "
                f"--max-length {limit}, and longer samples are skipped"
            )


def _checked(checkpoint: Checkpoint, arguments: dict[str, Any]) -> tuple["ItemMaker", StructureProbe]:
    """Run the checks that need no engine; returns what makes items of images, and a probe sample."""
    from vllm import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from switchkd.pipelines.capture.backends.vllm_inputs import ItemMaker

    with _refused():
        model_config = EngineArgs(**arguments).create_model_config()
    check_platform(model_config, checkpoint, bool(arguments.get("enable_expert_parallel")))
    with as_checkpoint_error(checkpoint.path, "vLLM cannot open the processor of {}"):
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    make = ItemMaker(processor, checkpoint.config, model_config.dtype)
    probe = StructureProbe(checkpoint, processor, make)
    if not family_of(
        checkpoint.config
    ).is_llava:  # whose folder may lack transformers' processor; an item is its pixels alone
        probe.check()
    return make, probe


@contextmanager
def _refused() -> Iterator[None]:
    """Convert what vLLM raises before it runs a sample, about its arguments, a config or the memory, to a ConfigError."""
    with TemporaryDirectory() as folder:
        cause = Path(folder) / "cause"
        os.environ[CAUSE] = str(cause)
        try:
            yield
        except Exception as error:
            if not is_library_failure(error):
                raise
            known = RuntimeError(cause.read_text(encoding="utf-8")) if cause.exists() else error
            raise ConfigError(f"vLLM does not start: {words_of(known)}") from error
        finally:
            del os.environ[CAUSE]


def _start_engine(arguments: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine

    with _refused():
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
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
