"""Defines the values and limits of options without importing torch, so that the command line starts quickly.

Each `Literal` is the type of an option. The meaning of its values is documented where they are used: objectives in
`losses/objective.py`, tail policies in `losses/signals.py`, image modes in `models/checkpoint.py`, payloads in `stores/layout.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from switchkd.errors import ConfigError

ObjectiveName = Literal[
    "sft",
    "fkl",
    "rkl",
    "bild-fkl",
    "bild-rkl",
    "dbild-fkl",
    "dbild-rkl",
    "switch-ce",
    "llava-kd",
    "align-kd",
    "compodistill",
    "align-ti-iva",
]
BASELINE_OBJECTIVES = (
    "llava-kd",
    "align-kd",
    "compodistill",
    "align-ti-iva",
)  # baselines, which have no switch pathway and need a live teacher
NormalizeBy = Literal["position", "sample"]
WeightBy = Literal["visual-advantage"]
TailPolicy = Literal["student", "uniform", "floor"]
ImageMode = Literal["own", "square", "pad"]
PayloadName = Literal["topk", "hidden", "both"]
HiddenDtype = Literal["steps", "float16", "bfloat16"]
ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]

StoreLocation = Path | str  # a folder, or the URL of a prefix of an object store
MIXTURE_ENDINGS = (".yaml", ".yml")  # by which a mixture of data files is told from a data file

MAX_IMAGE_PIXELS = 1 << 26  # larger images are refused before decoding
MAX_SKIPPED = 0.01  # share of a data file's samples; a run that skips more stops
# Of transformers, for `train`: older versions cannot run Llava's LM head at selected rows only. Capture needs 5.16 or newer.
OLDEST_FOR_TRAINING = "5.22"
LDPV2_GRID = 12  # LDPv2's published output is 12×12 tokens


def is_mixture(data: Path) -> bool:
    """Whether a path given as data is that of a mixture of data files, by its ending."""
    return data.suffix.lower() in MIXTURE_ENDINGS


def check_objective(
    name: str,
    switch: bool,
    temperature: float | None = None,
    window: int | None = None,
    normalize_by: str = "position",
    weight_by: str | None = None,
) -> None:
    """Check that the settings of an objective are consistent; see `losses.objective.Objective` for their meaning.

    Raises:
        ConfigError: unknown name, `switch` or `window` set for an objective without it, `switch-ce` without switch or with a
            temperature, weights of positions for an objective without a divergence, a temperature that is not positive.
    """
    names = get_args(ObjectiveName)
    if name not in names:
        raise ConfigError(f"no objective {name!r}; there are {', '.join(names)}")
    if name == "sft" and switch:
        raise ConfigError("objective sft has no teacher to switch to: pass --no-switch")
    if name == "switch-ce" and not switch:
        raise ConfigError(
            "objective switch-ce is a cross-entropy on the switch pathway: leave --no-switch out, or take sft"
        )
    if name == "switch-ce" and temperature is not None:
        raise ConfigError("objective switch-ce compares no logits with a teacher's: leave --temperature out")
    if name in BASELINE_OBJECTIVES and switch:
        raise ConfigError(f"objective {name} has no switch pathway: pass --no-switch")
    if window is not None and not name.startswith("dbild"):
        raise ConfigError(f"a knee window belongs to dbild-fkl and dbild-rkl, not to {name}")
    if window is not None and window < 2:
        raise ConfigError(f"a knee window has at least 2 logits, got {window}")
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"the temperature must be positive, got {temperature}")
    ways = get_args(NormalizeBy)
    if normalize_by not in ways:
        raise ConfigError(f"the mean is one over {'s or over '.join(ways)}s, got {normalize_by!r}")
    if weight_by is not None and weight_by not in get_args(WeightBy):
        raise ConfigError(f"there are no weights {weight_by!r}; there are {', '.join(get_args(WeightBy))}")
    if weight_by is not None and name in ("sft", "switch-ce"):
        raise ConfigError(
            f"objective {name} compares with no logits of a teacher, which --weight-by {weight_by} would weight: leave it out"
        )


def absent_terms(objective: str, switch: bool) -> frozenset[str]:
    """Return which of a run's logged losses are always 0, since its objective has no such term; lines for people leave them out."""
    absent = {"loss_align"} if objective in ("sft", "switch-ce") else set()
    return frozenset(absent if switch else absent | {"loss_vsd"})


LORA_PARTS = ("language", "vision")  # parts of a student that may train as LoRA; a projector is small and trains whole


@dataclass(frozen=True)
class Lora:
    """Which linear layers of a student train as LoRA, and how; see `switchkd.models.lora`."""

    rank: int
    alpha: float  # the product of the two matrices is multiplied by alpha / rank
    dropout: float = 0.0  # of what enters the matrices
    parts: frozenset[str] = frozenset({"language"})  # of `LORA_PARTS`
    targets: tuple[str, ...] | None = None  # last parts of module names, such as "q_proj"; None: every linear layer
