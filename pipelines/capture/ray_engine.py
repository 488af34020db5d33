"""Capture on a Ray cluster: one actor per device, each a worker with its own teacher; Ray Data assigns parts and restarts actors.

The store is the only state. The part of an actor that died is assigned again; if the actor had already committed it, the part is
found in the store and skipped.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from switchkd.errors import ConfigError, InputError, RunError, SwitchKDError
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker, PartDone
from switchkd.stores import Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

PART_RETRIES = 5  # per part: a part whose actors always die must end the job


def require_ray() -> None:
    """Raise ConfigError, with install instructions, if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray Data: pip install 'switchkd[ray]' (docs/cluster.md)")


class CaptureActor:
    """One actor: it creates its worker with the first part, then captures the parts assigned to it."""

    def __init__(self, options: CacheOptions, manifest: Manifest, anew: frozenset[int] = frozenset()) -> None:
        self.options, self.manifest, self.anew = options, manifest, anew

    @cached_property
    def worker(self) -> CaptureWorker:
        """The worker, on the device that this actor uses."""
        check_available(self.options.backend, self.options.device)
        return CaptureWorker(self.options, self.manifest, self.anew)

    def __call__(self, batch: dict[str, "NDArray[Any]"]) -> dict[str, "NDArray[Any]"]:
        """Capture a batch of parts; returns one JSON text per part, or one for the error, whose type Ray would not preserve."""
        try:
            texts = [json.dumps(asdict(done)) for part in batch["part"] for done in self._capture(int(part))]
        except SwitchKDError as error:
            texts = [json.dumps({"failed": str(error), "exit_code": error.exit_code})]
        return {"done": np.array(texts, dtype=object)}

    def _capture(self, part: int) -> Iterator[PartDone]:
        if part not in self.anew and self.worker.writer.has_part(
            part
        ):  # by an actor that died before it could report it
            yield PartDone(part, written=False, samples=0, positions=0, skipped={}, written_bytes=0)
        else:
            yield from self.worker.write([part])


def capture_with_ray(
    options: CacheOptions, manifest: Manifest, parts: Sequence[int], anew: frozenset[int] = frozenset()
) -> Iterator[PartDone]:
    """Capture parts on a Ray cluster: the one that RAY_ADDRESS names or this process is in, else this machine.

    Yields:
        The result of each part, in the order of completion.

    Raises:
        InputError, RunError: what stopped an actor.
        RunError: no cluster, or a part's actors died repeatedly.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray cluster: {error}") from error
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    options, actors, resources = plan_actors(options, ray.cluster_resources())
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    done = rows.map_batches(
        CaptureActor,
        fn_constructor_args=(options, manifest, anew),
        batch_size=1,
        # One part in progress and one queued: an actor never idles, and little work is lost if it dies.
        compute=ActorPoolStrategy(size=min(actors, len(parts)), max_tasks_in_flight_per_actor=2),
        max_restarts=-1,
        max_task_retries=PART_RETRIES,
        **resources,
    )
    try:
        for row in done.iter_rows():
            answer = json.loads(row["done"])
            if "failed" in answer:
                kind = InputError if answer["exit_code"] == InputError.exit_code else RunError
                raise kind(answer["failed"])
            yield PartDone(**answer)
    except ray.exceptions.RayError as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"Ray gave up: {first_line}; run the same command again") from error


def plan_actors(options: CacheOptions, cluster: dict[str, float]) -> tuple[CacheOptions, int, dict[str, float]]:
    """Return (options as the actors get them, number of actors, what Ray reserves for each).

    Args:
        cluster: its resources, from `ray.cluster_resources()`. With GPUs, an actor takes as many as share a teacher.

    Raises:
        ConfigError: more GPUs per teacher than the cluster has.
    """
    gpus = int(cluster.get("GPU", 0))
    device = options.device if options.device != "auto" else "cuda" if gpus else "cpu"
    if not gpus or (options.backend == "transformers" and device == "cpu"):
        return replace(options, device=device), options.actors or 1, {"num_cpus": 1}
    if gpus < options.tensor_parallel:
        raise ConfigError(f"--tensor-parallel {options.tensor_parallel}, and the Ray cluster has {gpus} GPUs")
    actors = options.actors or gpus // options.tensor_parallel
    return replace(options, device=device), actors, {"num_gpus": options.tensor_parallel}
