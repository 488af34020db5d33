"""What a run needs to go on exactly: optimizer, scheduler and random states, as safetensors and JSON, never as a pickle."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from switchkd.errors import CheckpointError

TENSORS = "optimizer.safetensors"
PLAIN = "optimizer.json"
FINISHED = "trainer_state.json"  # the Trainer writes it last


def save(folder: Path, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Save the state of optimizer and scheduler: tensors apart, the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain_state: dict[str, dict[str, Any]] = {}
    for number, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.contiguous()
            else:
                plain_state.setdefault(str(number), {})[name] = value
    save_file(tensors, folder / TENSORS)
    plain = {"state": plain_state, "param_groups": optimizer["param_groups"], "scheduler": scheduler}
    (folder / PLAIN).write_text(json.dumps(plain))


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (optimizer state, scheduler state). Raises CheckpointError if they are missing or damaged."""
    try:
        plain = json.loads((folder / PLAIN).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot resume from {folder}: {error}") from error
    state: dict[int, dict[str, Any]] = {int(number): dict(entries) for number, entries in plain["state"].items()}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    for group in plain["param_groups"]:  # JSON has no tuples; betas is one
        group |= {name: tuple(value) for name, value in group.items() if isinstance(value, list) and name != "params"}
    return {"state": state, "param_groups": plain["param_groups"]}, plain["scheduler"]


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


def load_rng(folder: Path, process: int) -> None:
    """Restore what `save_rng` saved; a process that has no file (another world size) keeps its seed."""
    if not (folder / f"rng_{process}.json").is_file():
        return
    plain = json.loads((folder / f"rng_{process}.json").read_text())
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    states = load_file(folder / f"rng_{process}.safetensors")
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        device = int(name.removeprefix("cuda."))
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end; one that was cut short is passed over."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / FINISHED).read_text())
        except (OSError, ValueError):
            continue
        return path
    return None
