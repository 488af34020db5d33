"""Options of stage two, and the record of them that lies beside a run."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import ConfigError
from switchkd.objective import Objective
from switchkd.signals import TailPolicy
from switchkd.stores.place import Location

RECORD = "run.yaml"
# Options that may change between two starts of one run: they do not change what is computed.
FREE = {"log_every", "save_every", "workers", "output"}


def plain(options: Any) -> dict[str, Any]:
    """Return an options dataclass as YAML data; paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


@dataclass(frozen=True)
class TrainOptions:
    """What `switchkd train` was asked for; fields are its options. Defaults follow LLaVA-KD's fine-tuning stage."""

    student: Path
    data: Path
    output: Path
    teacher: Path | None = None
    images: Path | None = None
    cache: Location | None = None
    objective: str = "dbild-rkl"
    switch: bool = True
    align_weight: float = 1.0  # λ1
    vsd_weight: float = 1.0  # λ2
    temperature: float | None = None
    window: int | None = None
    teacher_mode: str = "cached"  # or live: the standard pathway online, without a store
    payload: str | None = None  # None: hidden if the store has it, else topk
    tail: TailPolicy = "student"
    template: str | None = None  # None: the store's; without a store qwen2_base
    max_length: int | None = None  # None: the store's; without a store 2048
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    batch_size: int = 16  # samples per device
    accumulation: int = 1
    lr: float = 2e-5
    warmup: float = 0.03  # share of the steps
    schedule: str = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    precision: str = "float32"  # or bfloat16: autocast over float32 master weights
    teacher_dtype: str = "auto"
    seed: int = 42
    log_every: int = 10
    save_every: int = 500
    workers: int = 0
    trust_remote_code: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)  # further transformers.TrainingArguments

    def as_objective(self) -> Objective:
        """Return the objective; raises ConfigError if its parts contradict each other."""
        return Objective(self.objective, self.switch, self.align_weight, self.vsd_weight, self.temperature, self.window)


def record(folder: Path, plain: dict[str, Any]) -> None:
    """Write the resolved options beside a run, or check them against those that it was begun with.

    Args:
        folder: the run's output. plain: option → YAML value; those of `FREE` may change between two starts.

    Raises:
        ConfigError: the run was begun with other options; names them.
    """
    path = folder / RECORD
    if path.is_file():
        try:
            before = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is damaged: {error}") from error
        names = [name for name in plain if name not in FREE and before.get(name) != plain[name]]
        if names:
            lines = "\n  ".join(f"{name}: run {before.get(name)!r}, now {plain[name]!r}" for name in names)
            raise ConfigError(
                f"{folder} was begun with other options:\n  {lines}\nRepeat those, or pass another --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(plain, sort_keys=False))


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is either there as a whole or not at all; several processes may write the same at once."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)
