"""The interface of capture backends, which run the teacher, and checks for the two that exist: transformers and vLLM."""

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from switchkd.data.encoded import EncodedSample
from switchkd.errors import ConfigError, RunError
from switchkd.stores import Manifest, Payload

_SOFTWARE = ("switchkd", "torch", "transformers", "zarr", "numcodecs")


class BackendFailed(RunError):
    """The teacher cannot run any more, for a reason that no sample causes."""


class Backend(ABC):
    """A loaded teacher.

    A caller may `start` up to `ahead` batches before it collects the first with `finish`, so that a teacher with its own queue
    never waits for the next batch; `capture` does both.
    """

    ahead = 1

    @abstractmethod
    def capture(self, samples: Sequence[EncodedSample], manifest: Manifest) -> list[Payload]:
        """Run the teacher over samples and pack each one's positions as the manifest specifies.

        Raises:
            RunError: logits of a sample are not finite.
            BackendFailed: the teacher failed.
        """

    def start(self, samples: Sequence[EncodedSample], manifest: Manifest) -> Any:
        """Begin a capture; returns a handle for `finish`."""
        return samples, manifest

    def finish(self, started: Any) -> list[Payload]:
        """Wait for a started capture, and return its payloads as `capture` does."""
        return self.capture(*started)


def require_vllm() -> None:
    """Raise ConfigError, with install instructions, if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--backend vllm needs vLLM, in an environment of its own: pip install 'switchkd[vllm]' (docs/cluster.md)"
        )


def software_of(backend: str) -> dict[str, str]:
    """Return the package versions for a manifest's `written_by`."""
    found = {"backend": backend} | {name: importlib.metadata.version(name) for name in _SOFTWARE}
    if backend == "vllm":  # the distribution for CPUs has another name
        (distribution, *_) = importlib.metadata.packages_distributions()["vllm"]
        found["vllm"] = importlib.metadata.version(distribution)
    return found
