"""What stage one needs of whatever runs the teacher, and the choice between the two that there are."""

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from switchkd.data.encoding import EncodedSample
from switchkd.errors import ConfigError, RunError
from switchkd.stores import Manifest, Payload

_SOFTWARE = ("switchkd", "torch", "transformers", "zarr", "numcodecs")


class BackendFailed(RunError):
    """The teacher runs no more; no sample is to blame."""


class Backend(ABC):
    """A loaded teacher.

    A caller may `start` up to `ahead` batches before it takes the first with `finish`, so that a teacher with a queue of its own
    never waits for the next batch; `capture` does both.
    """

    ahead = 1

    @abstractmethod
    def capture(self, samples: Sequence[EncodedSample], manifest: Manifest) -> list[Payload]:
        """Run the teacher over samples and pack each one's positions as the manifest asks.

        Raises:
            RunError: logits of a sample are not finite.
            BackendFailed: the teacher failed.
        """

    def start(self, samples: Sequence[EncodedSample], manifest: Manifest) -> Any:
        """Begin a capture; returns what `finish` takes."""
        return samples, manifest

    def finish(self, started: Any) -> list[Payload]:
        """Return what `capture` would."""
        return self.capture(*started)


def require_vllm() -> None:
    """Raise ConfigError, saying how to install it, if vLLM cannot be had here."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--backend vllm needs vLLM, in an environment of its own: pip install 'switchkd[vllm]' (docs/cluster.md)"
        )


def software_of(backend: str) -> dict[str, str]:
    """Return the versions that a manifest's `written_by` names."""
    found = {"backend": backend} | {name: importlib.metadata.version(name) for name in _SOFTWARE}
    if backend == "vllm":  # the distribution for CPUs has another name
        (distribution, *_) = importlib.metadata.packages_distributions()["vllm"]
        found["vllm"] = importlib.metadata.version(distribution)
    return found
