"""The entry point `vllm.general_plugins`: registers a capture model for every class of vLLM, in every process of vLLM."""

import re

PREFIX = "SwitchKDCapture"
_MODULE = "switchkd.pipelines.capture.backends.vllm_model"


def register() -> None:
    """Register `capture_architecture(…)` of every architecture that vLLM knows.

    No class is imported: vLLM asks `vllm_model` for one, by its attribute, when an engine uses it. The attribute holds vLLM's
    version, since vLLM keeps what it found out about a class in a file, under the attribute's name and a hash of `vllm_model`.
    """
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    version = re.sub(r"\W", "_", __version__)
    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        ours = capture_architecture(architecture)
        if architecture.startswith(PREFIX) or ours in known:
            continue
        ModelRegistry.register_model(ours, f"{_MODULE}:{PREFIX}_{version}__{architecture}")
        if architecture in MODELS_CONFIG_MAP:  # how vLLM adjusts its configuration, by the architecture's name
            MODELS_CONFIG_MAP[ours] = MODELS_CONFIG_MAP[architecture]


def capture_architecture(architecture: str) -> str:
    """Return the name of an architecture's capture model; it ends as the architecture does, which vLLM also reads."""
    return PREFIX + architecture


def architecture_of(attribute: str) -> str | None:
    """Return the architecture whose capture model an attribute of `vllm_model` stands for; None if it is none."""
    prefix, _, architecture = attribute.partition("__")
    return architecture if prefix.startswith(f"{PREFIX}_") and architecture else None
