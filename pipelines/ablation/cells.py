"""The cells of an ablation: which training runs a recipe's matrix describes.

A cell is one point of the matrix. Points that are the same run are one cell: without a distilled training stage, teacher,
objective, switch and signal have no effect; "sft" replaces distilled stages by plain ones; the baselines (llava-kd and those after
it) have no switch pathway and run the teacher live; switch-ce has no store, and is plain in stages that leave the vision tower
frozen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from switchkd.errors import ConfigError
from switchkd.pipelines.options import value_of_option
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import STAGES
from switchkd.settings import BASELINE_OBJECTIVES, ObjectiveName

AXES = ("student", "scheme", "objective", "switch", "teacher", "signal", "seed")
OPTION_AXES = ("align_weight", "vsd_weight", "lr", "steps")  # None: the stage's own
DISTILLED = {"dpt": "pt", "dft": "sft"}  # training stage with a teacher → the same without


@dataclass(frozen=True)
class Cell:
    """One configuration of training one student."""

    student: str
    scheme: str  # names of stages with "-" between
    objective: str = "sft"
    switch: bool = False
    teacher: str | None = None
    seed: int = 0
    align_weight: float | None = None
    vsd_weight: float | None = None
    lr: float | None = None
    steps: int | None = None
    signal: str | None = None  # what Align reads, of the recipe's `signals`; None: the store of `cache`

    @property
    def stages(self) -> list[str]:
        """The training stages of the scheme in order."""
        return self.scheme.split("-")

    def __str__(self) -> str:
        words = [
            self.student,
            self.scheme,
            self.objective,
            "switch" if self.switch else "",
            self.teacher or "",
            self.signal or "",
        ]
        words += [f"{axis} {value:g}" for axis in OPTION_AXES if (value := getattr(self, axis)) is not None]
        return ", ".join([*filter(None, words), f"seed {self.seed}"])

    def options_of(self, stage: str) -> dict[str, Any]:
        """Return the options of `stage` that this cell decides: rate and steps of fine-tuning, and weights of terms in it."""
        names = {"sft": ("lr", "steps"), "dft": OPTION_AXES}.get(stage, ())
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def cells_of(matrix: Any, content: Mapping[str, Any], path: Path) -> tuple[Cell, ...]:
    """Expand the matrix; equal runs are one cell, in the order of their first appearance."""
    cells: dict[Cell, None] = {}
    for axes in matrix if isinstance(matrix, list) else [matrix]:
        if not isinstance(axes, Mapping):
            raise ConfigError(f"recipe {path}: matrix should hold axes by name, found {axes!r}")
        require_known("matrix", axes, {*AXES, *OPTION_AXES}, path)
        for key in ("teacher", "student"):
            there = list(content.get(f"{key}s", {}))
            axes = {key: there[0] if len(there) == 1 else None} | dict(axes)
        values = {"scheme": "pt-dft", "objective": "dbild-rkl", "switch": True, "seed": [0, 1, 2]} | dict(axes)
        values = dict.fromkeys((*OPTION_AXES, "signal")) | values
        every = (*AXES, *OPTION_AXES)
        lists = [value if isinstance(value, list) else [value] for value in (values[axis] for axis in every)]
        for point in product(*lists):
            cells[_cell(dict(zip(every, point, strict=True)), content, path)] = None
    if not cells:
        raise ConfigError(f"recipe {path}: the matrix is empty")
    return tuple(cells)


def _cell(point: dict[str, Any], content: Mapping[str, Any], path: Path) -> Cell:
    """Check one point of the matrix, and remove settings that have no effect."""
    where = f"recipe {path}: matrix"
    point["scheme"] = str(point["scheme"]).lower()
    for axis in ("objective", "student", "teacher", "signal"):
        if not isinstance(point[axis], str | None):
            raise ConfigError(f"{where}: {axis} is a name, found {point[axis]!r}")
    for axis, known in (("objective", get_args(ObjectiveName)), ("student", content.get("students", {}))):
        if point[axis] not in known:
            raise ConfigError(f"{where} has no {axis} {point[axis]!r}; there are {', '.join(known)}")
    if not isinstance(point["switch"], bool) or isinstance(point["seed"], bool) or not isinstance(point["seed"], int):
        raise ConfigError(f"{where}: switch is true or false and seed a number, found {point}")
    for axis in OPTION_AXES:
        if point[axis] is not None:
            try:
                point[axis] = value_of_option(TrainOptions, axis, point[axis])
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
    if point["signal"] is not None and point["signal"] not in content.get("signals", {}):
        there = ", ".join(content.get("signals", {})) or "none"
        raise ConfigError(f"{where} has no signal {point['signal']!r}; there are {there}")
    if point["objective"] in (*BASELINE_OBJECTIVES, "switch-ce"):
        point["signal"] = None  # they read no store
    if point["objective"] in BASELINE_OBJECTIVES:
        point["switch"] = False  # they have no switch pathway
    if point["objective"] == "switch-ce":
        point["switch"] = True  # it is nothing else
        point["align_weight"] = None
    if not point["switch"]:
        point["vsd_weight"] = None
    cell = Cell(**point)
    if unknown := [stage for stage in cell.stages if stage not in STAGES]:
        raise ConfigError(f"{where} has no stage {unknown[0]!r} in {cell.scheme!r}; there are {', '.join(STAGES)}")
    if cell.objective == "sft":
        cell = replace(cell, scheme="-".join(DISTILLED.get(stage, stage) for stage in cell.stages))
    if not any(stage in DISTILLED for stage in cell.stages):
        return replace(
            cell, objective="sft", switch=False, teacher=None, signal=None, align_weight=None, vsd_weight=None
        )
    if cell.teacher not in content.get("teachers", {}):
        there = ", ".join(content.get("teachers", {})) or "none"
        raise ConfigError(f"{where} has no teacher {cell.teacher!r}; there are {there}")
    return cell


def is_of_arm(cell: Cell, axes: Mapping[str, Any]) -> bool:
    """Whether a cell has the values that name an arm; an axis that is not named may have any."""
    return all(getattr(cell, axis) == value for axis, value in axes.items())


def require_known(what: str, found: Iterable[Any], known: set[str], path: Path) -> None:
    """Raise ConfigError for the first name in `found`, in sorted order, that is not known."""
    if unknown := sorted({str(name) for name in found} - known):
        raise ConfigError(f"recipe {path}: {what} has no {unknown[0]!r}; there are {', '.join(sorted(known))}")
