"""A teacher without its vision tower's layers: they are neither read from disk nor kept in memory.

The tower's code stays, with the small weights around its layers: run over an image, it gives features of the right number, which
`features.replay_features` replaces by the student's before the projector reads them. So tiles are joined, newlines inserted and
windows ordered by the teacher's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from switchkd.fingerprints import component_of, weight_files
from switchkd.models.components import tower_layers_of

READ = ("projector", "language")  # components of which weights are read


@cache
def hollow_class(kind: type[Any]) -> type[Any]:
    """Return a subclass of a model class whose vision tower has layers that pass their input through.

    transformers finds the saved names of weights by the name of the class, so they are registered for the subclass too; without
    this, a whole language model can come up with random weights.
    """

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)  # from_pretrained builds on the meta device, so the layers allocate no memory
        hollow_out(self)

    made = type(f"Hollow{kind.__name__}", (kind,), {"__init__": build, "config_class": kind.config_class})
    made.__module__ = __name__
    for name in (kind.__name__, kind.config_class.model_type):
        if (mapping := get_checkpoint_conversion_mapping(name)) is not None:
            register_checkpoint_conversion_mapping(made.__name__, mapping, overwrite=True)
            break
    return made


def hollow_out(model: Any) -> None:
    """Let the layers of the vision tower pass their input through, and drop their weights."""
    for layer in tower_layers_of(model):
        layer.forward = _pass_through  # type: ignore[method-assign]
        for name in [name for name, _ in layer.named_children()]:
            delattr(layer, name)
        for name in list(layer._parameters):
            del layer._parameters[name]


@contextmanager
def tower_bypassed(model: Any) -> Iterator[None]:
    """Let the layers of a whole model's vision tower pass their input through inside the block, where its features are replaced."""
    layers = tower_layers_of(model)
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _pass_through  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]


def _pass_through(*inputs: Any, **named: Any) -> Any:
    return inputs[0] if inputs else named["hidden_states"]


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from printing which weights it did not find; the caller checks them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def built_of(kind: type[Any], config: Any) -> Any:
    """Build a model with random weights, as from_pretrained does: what `kind` drops in its constructor is never allocated."""
    with torch.random.fork_rng(devices=[]), _without_report():
        return kind.from_pretrained(None, config=config, state_dict={}, dtype=torch.float32).eval()


def load_hollow(kind: Any, config: Any, folder: Any, dtype: str | torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint's projector and language model into a hollow model: (model, report as from_pretrained gives it).

    Only files with weights of these components are opened, and only those weights are read; files of a tower may be absent. What
    the tower keeps around its layers is random, and nothing reads it.

    Args:
        kind: the checkpoint's own class. dtype: "float32", "bfloat16", …

    Raises:
        CheckpointError: files are missing. OSError, ValueError: as from_pretrained raises them.
    """
    opened: list[Any] = [safe_open(file, framework="pt") for file in weight_files(folder, READ)]
    tensors = {
        name: file.get_slice(name)  # read when transformers places it
        for file in opened
        for name in file.keys()  # noqa: SIM118  not a dict
        if component_of(name) in READ
    }
    with torch.random.fork_rng(devices=[]), _without_report():  # what is not read is drawn
        model, report = hollow_class(kind).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    missing = {name for name in report["missing_keys"] if component_of(name) in READ}
    return model, dict(report) | {"missing_keys": missing}
