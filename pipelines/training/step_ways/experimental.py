"""Ways of running a step that no GPU has confirmed yet: checked, and switched on, by name (`--experimental`)."""

import importlib.util
import logging
import warnings
from typing import Any

import torch

from switchkd.errors import ConfigError
from switchkd.losses.selection import leading_entries, use_kernels
from switchkd.models.components import language_model_of, layers_of, tower_layers_of
from switchkd.models.varlen_attention import check_kernel
from switchkd.pipelines.training.option_groups.step import FP8_TEACHER, TRITON, VARLEN
from switchkd.pipelines.training.step_ways.fp8_teacher import check_fp8

BACKEND = "inductor"
log = logging.getLogger(__name__)


def begin(chosen: frozenset[str], arguments: Any) -> None:
    """Try what was asked for on this run's device, and choose Triton's kernels if they were; before any model is loaded.

    Args:
        chosen: of `StepOptions.as_experimental`. arguments: of the Trainer; they know the device.

    Raises:
        ConfigError: a kernel does not exist here, or computes something else than its reference.
    """
    use_kernels("torch")
    if VARLEN in chosen:
        check_kernel(arguments.device)
    if FP8_TEACHER in chosen:
        check_fp8(arguments.device)
    if TRITON in chosen:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--experimental triton-selection needs triton, which torch's CUDA build brings; leave it out"
            )
        if arguments.device.type != "cuda":
            raise ConfigError(
                f"--experimental triton-selection needs a CUDA device, this run computes on {arguments.device}"
            )
        check_selection(arguments.device)


def check_selection(device: torch.device) -> None:
    """Switch Triton's kernels on, and compare their knees and order with those of torch on random rows.

    Raises:
        ConfigError: they differ; torch's operators are then in use again.
    """
    rows = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0)).mul(4)
    rows[4:] = rows[4:].round()  # ties
    expected, knees = leading_entries(rows)
    use_kernels("triton")
    found, k = (each.cpu() for each in leading_entries(rows.to(device)))
    there = torch.arange(expected.shape[1]) < knees.unsqueeze(-1)
    if not torch.equal(k, knees) or bool((found[:, : expected.shape[1]] != expected)[there].any()):
        use_kernels("torch")
        raise ConfigError(
            f"--experimental triton-selection: the kernels select otherwise than torch on {device}; leave it out"
        )


def compile_layers(*models: Any) -> None:
    """Compile each layer of the models' language models and vision towers by itself, for batches of any size.

    What torch cannot compile runs uncompiled. `compilations` counts both.
    """
    torch._dynamo.config.suppress_errors = True
    # The compiler looks at the gradient of every input of a layer, also of those that have none of their own.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch._dynamo.utils.counters.clear()
    for model in models:
        for layer in [*layers_of(language_model_of(model)), *tower_layers_of(model)]:
            layer.compile(dynamic=True, backend=BACKEND)


def compilations() -> dict[str, int]:
    """Return how many graphs were compiled in this process since `compile_layers`, and how many frames run uncompiled instead."""
    counters = torch._dynamo.utils.counters
    frames = counters["frames"]
    return {"compiled_graphs": counters["stats"]["unique_graphs"], "not_compiled": frames["total"] - frames["ok"]}
