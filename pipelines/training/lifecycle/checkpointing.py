"""Checkpoints for exact resume: weights, optimizer, scheduler and random states, as safetensors and JSON, never as a pickle.

A checkpoint is whole and keyed by parameter names. It does not depend on how many processes wrote it or on how they sharded the
model, so any number of processes can load it, replicated (DDP) or sharded (FSDP).
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from switchkd.errors import CheckpointError
from switchkd.models.lora import is_lora, lora_config_of, merged_weights, plain_name, save_adapter
from switchkd.pipelines.run_folder import sync, sync_tree

TENSORS = "optimizer.safetensors"
PLAIN = "optimizer.json"
ADAPTER = "switch_adapter.safetensors"  # saved beside the student's weights, never in the same file
LORA = "lora.safetensors"  # A and B of each layer; the student's weights beside it are merged
LORA_FOLDER = "adapter"  # of a finished run that trained nothing but LoRA: peft's own format


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights on the CPU, gathered if they are sharded; empty on all processes except the first."""
    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {name: tensor for name, tensor in weights.items() if name not in _tied(model)}


def set_apart_adapter(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Save a switch adapter's weights in a separate file and return the student's weights without them."""
    adapter = {name: tensor for name, tensor in weights.items() if name.startswith("switch_adapter.")}
    if adapter:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / ADAPTER)
    return {name: tensor for name, tensor in weights.items() if name not in adapter}


def set_apart_lora(folder: Path, model: Any, weights: dict[str, Tensor], finished: bool) -> dict[str, Tensor]:
    """Return the student's weights with LoRA merged into them; the LoRA weights are saved in a separate file.

    Args:
        finished: whether this is the trained student. Then they are saved for peft, if nothing else was trained: on the student's
            own checkpoint they would otherwise be another model than the trained one.
    """
    if (config := lora_config_of(model)) is None:
        return weights
    plain, lora = merged_weights(weights, config.lora_alpha / config.r)
    if not finished:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in lora.items()}, folder / LORA)
    elif all(is_lora(name) for name, parameter in model.named_parameters() if parameter.requires_grad):
        save_adapter(folder / LORA_FOLDER, config, lora, str(model.config.name_or_path))
        sync_tree(folder / LORA_FOLDER)
    return plain


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model, sharded or not; every process calls it.

    Frozen weights of layers with LoRA stay those of the student's own checkpoint: here they are merged.

    Raises:
        CheckpointError: the parameter names differ from the model's, or a file is damaged.
    """
    files = [file for kind in ("model*.safetensors", ADAPTER, LORA) for file in sorted(folder.glob(kind))]
    found: set[str] = set()
    for file in files:
        with _reading(file), safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    own = model.state_dict().keys()
    expected = {plain_name(name) for name in own}
    if missing := sorted(expected - found - _tied(model)):
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}")
    if unknown := sorted(found - expected):
        raise CheckpointError(f"{folder} holds unknown weights, the first is {unknown[0]}")
    weights: dict[str, Any] = {}
    if _reads(model):
        for file in files:
            with _reading(file):
                weights |= {name: tensor for name, tensor in load_file(file).items() if name in own}
    set_model_state_dict(model, weights, options=_loading(model))


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: dict[str, Any]) -> None:
    """Save the optimizer's and scheduler's state: tensors as safetensors, the rest as JSON. All processes call it, one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    if not _is_first():
        return
    tensors: dict[str, Tensor] = {}
    plain_state: dict[str, dict[str, Any]] = {}
    for parameter, entries in whole["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value.contiguous()
            else:
                plain_state.setdefault(parameter, {})[name] = value
    save_file(tensors, folder / TENSORS)
    plain = {"state": plain_state, "param_groups": whole["param_groups"], "scheduler": scheduler}
    (folder / PLAIN).write_text(json.dumps(plain))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the optimizer, and return the scheduler's state. Raises CheckpointError if they are missing or damaged."""
    with _reading(folder):
        plain = json.loads((folder / PLAIN).read_text())
        tensors = load_file(folder / TENSORS) if _reads(model) else {}
    state: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in plain["state"].items()}
    for key, value in tensors.items():
        parameter, name = key.rsplit(".", 1)
        state.setdefault(parameter, {})[name] = value
    for group in plain["param_groups"]:  # JSON has no tuples; betas is one
        group |= {name: tuple(value) for name, value in group.items() if isinstance(value, list) and name != "params"}
    whole = {"state": state, "param_groups": plain["param_groups"]} if _reads(model) else {}
    set_optimizer_state_dict(model, optimizer, whole, options=_loading(model))
    scheduler: dict[str, Any] = plain["scheduler"]
    return scheduler


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise CheckpointError for a file that cannot be read back; only checkpoints without digests come here unread."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot resume from {path}: {error}. Move this checkpoint away, and the same command goes on from the one before"
        ) from error


def _tied(model: Any) -> set[str]:
    """Return the names that are aliases of another (tied) parameter; checkpoints do not contain them."""
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _reads(model: nn.Module) -> bool:
    """Whether this process reads the tensors: either all do, or the first reads them and sends the others their shards."""
    return _is_first() or not isinstance(model, FSDPModule)


def _loading(model: nn.Module) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=isinstance(model, FSDPModule), strict=False)


def save_rng(folder: Path, process: int) -> None:
    """Save the random states of this process: Python, NumPy, torch and its GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), position, has_gauss, cached]
    plain = {"python": [version, list(internal), gauss], "numpy": numpy_state}
    (folder / f"rng_{process}.json").write_text(json.dumps(plain))
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    save_file(states, folder / f"rng_{process}.safetensors")
    for suffix in ("json", "safetensors"):  # the first process, perhaps on another host, cannot sync for this one
        sync(folder / f"rng_{process}.{suffix}")


def load_rng(folder: Path, process: int) -> None:
    """Restore what `save_rng` saved; a process without a file (the world size has changed) keeps its seed."""
    if not (folder / f"rng_{process}.json").is_file():
        return
    with _reading(folder):
        plain = json.loads((folder / f"rng_{process}.json").read_text())
        states = load_file(folder / f"rng_{process}.safetensors")
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        device = int(name.removeprefix("cuda."))
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
