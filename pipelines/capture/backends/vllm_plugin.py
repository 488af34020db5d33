"""The entry point `vllm.general_plugins`: makes the capture model known to every process of vLLM."""

ARCHITECTURE = "SwitchKDCaptureLlava"


def register() -> None:
    """Register the capture model by name; vLLM imports it when an engine asks for it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "switchkd.pipelines.capture.backends.vllm_model:CaptureLlava")
