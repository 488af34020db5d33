"""The entry point `vllm.general_plugins`: registers a capture model for every class of vLLM, in every process of vLLM."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

PREFIX = "SwitchKDCapture"
CAUSE = "SWITCHKD_VLLM_CAUSE"  # names the file to which an engine's process writes why it does not start
_MODULE = "switchkd.pipelines.capture.backends.vllm_model"


def register() -> None:
    """Register `capture_architecture(…)` of every architecture that vLLM knows.

    No class is imported: vLLM asks `vllm_model` for one, by its attribute, when an engine uses it. The attribute holds vLLM's
    version, since vLLM keeps what it found out about a class in a file, under the attribute's name and a hash of `vllm_model`.
    """
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    engine = logging.getLogger("vllm.v1.engine.core")
    if not any(isinstance(handler, CauseWriter) for handler in engine.handlers):
        engine.addHandler(CauseWriter())
    version = re.sub(r"\W", "_", __version__)
    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        ours = capture_architecture(architecture)
        if architecture.startswith(PREFIX) or ours in known:
            continue
        ModelRegistry.register_model(ours, f"{_MODULE}:{PREFIX}_{version}__{architecture}")
        if architecture in MODELS_CONFIG_MAP:  # how vLLM adjusts its configuration, by the architecture's name
            MODELS_CONFIG_MAP[ours] = MODELS_CONFIG_MAP[architecture]


class CauseWriter(logging.Handler):
    """Writes the exception that vLLM logs when an engine's process fails to the file that `CAUSE` names at that time.

    The parent of the process is told only that it failed. A forked process has the handlers of its parent, so the file is not one
    that was named when the plugin was loaded.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the exception of a record, if it has one."""
        if record.exc_info and record.exc_info[1] is not None and (named := os.environ.get(CAUSE)):
            with suppress(OSError):  # the folder is gone: nobody reads it any more
                Path(named).write_text(str(record.exc_info[1]), encoding="utf-8")


def capture_architecture(architecture: str) -> str:
    """Return the name of an architecture's capture model; it ends as the architecture does, which vLLM also reads."""
    return PREFIX + architecture


def architecture_of(attribute: str) -> str | None:
    """Return the architecture whose capture model an attribute of `vllm_model` stands for; None if it is none."""
    prefix, _, architecture = attribute.partition("__")
    return architecture if prefix.startswith(f"{PREFIX}_") and architecture else None
