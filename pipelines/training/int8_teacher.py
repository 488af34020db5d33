"""A frozen teacher with its layers' weights in int8 (`--teacher-dtype int8`), through torchao.

Only the linear layers of the language model are quantised: symmetric, with a scale for each group of 32 inputs. Embedding, norms,
projector and LM head are not; the LM head computes the teacher's logits from a store's hidden states. The error of such a teacher
is measured by `benchmarks/teacher_weights.py` and reported in docs/training-engine.md.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchkd.errors import ConfigError
from switchkd.pipelines.training.options import TrainOptions

NAME = "int8"
GROUP = 32  # weights of an output that share a scale; one scale per whole row would double the error


def check_int8(options: TrainOptions) -> None:
    """Raise ConfigError if a run requests an int8 teacher that it cannot use; called before anything is loaded."""
    if options.teacher_dtype != NAME:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("--teacher-dtype int8 needs torchao, which is not installed: pip install 'switchkd[torchao]'")


def to_int8(language: nn.Module) -> None:
    """Quantise the layers of a frozen language model in place.

    Raises:
        ConfigError: a layer's width is not a multiple of the group.
    """
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    config = Int8WeightOnlyConfig(granularity=PerGroup(GROUP), set_inductor_config=False)
    for name, module in language.get_submodule("layers").named_modules():
        if isinstance(module, nn.Linear):
            if module.in_features % GROUP:
                raise ConfigError(
                    f"--teacher-dtype int8 takes widths that are multiples of {GROUP}; layer {name} of the teacher has "
                    f"{module.in_features} inputs: pass --teacher-dtype bfloat16"
                )
            quantize_(module, config)
            module.forward = partial(_Int8Linear.apply, module)  # type: ignore[method-assign]


def count_as_int8(language: nn.Module) -> None:
    """Let `stored_bytes` count the layers of a model without weights as `to_int8` would store them; torchao is not needed.

    torchao keeps int8 weights [out, in], and for each group a float32 scale and an int8 zero point, [out, in / 32].
    """
    for module in language.get_submodule("layers").modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            groups = rows, columns // GROUP
            weight: Any = module.weight
            weight.qdata = torch.zeros(1, dtype=torch.int8).expand(rows, columns)
            weight.scale = torch.zeros(1).expand(groups)
            weight.zero_point = torch.zeros(1, dtype=torch.int8).expand(groups)


class _Int8Linear(torch.autograd.Function):
    """x Wᵀ + b; W is dequantised in the forward and in the backward pass. torchao's own forward keeps every dequantised W."""

    @staticmethod
    def forward(ctx: Any, module: nn.Linear, inputs: Tensor) -> Tensor:
        ctx.module = module
        return F.linear(inputs, _weight(module, inputs), module.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient @ _weight(ctx.module, gradient)


def _weight(module: nn.Linear, like: Tensor) -> Tensor:
    weight: Any = module.weight
    dequantised: Tensor = weight.dequantize().to(like.dtype)
    return dequantised


def stored_bytes(parameter: Tensor) -> int:
    """Return the bytes of a parameter in memory; torch reports the dequantised size of an int8 parameter."""
    parts = vars(parameter).values() if hasattr(parameter, "qdata") else [parameter]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
