"""The entry point `vllm.general_plugins`: registers the capture model in every process of vLLM."""

ARCHITECTURE = "SwitchKDCaptureLlava"


def register() -> None:
    """Register the capture model by name; vLLM imports it when an engine uses it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "switchkd.pipelines.capture.backends.vllm_model:CaptureLlava")
