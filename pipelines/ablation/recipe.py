"""Recipes of ablations: a YAML file that defines which students to train, and in which configurations.

    title: …                     one line for `switchkd ablate --list`
    base: NAME                   another recipe, whose entries apply where this one has none
    variables: {NAME: meaning}   variables that `--set NAME=VALUE` must set; used as ${NAME} below; ${workdir} is always set
    defaults: {NAME: value}      default values, which `--set` may change
    notes: …                     printed below the table
    easy_vqa, emoji_vqa: …       creates data and tiny models below ${workdir}, see `small_models.py`
    teachers, students: {NAME: checkpoint folder, or with easy_vqa or emoji_vqa the model to create}
    stages: {all, pt, dpt, sft, dft: options of `switchkd train`}; dpt inherits those of pt, dft those of sft
    cache: options of `switchkd cache-teacher`; one store per teacher and distilled training stage
    signals: {NAME: {cache: options of `switchkd cache-teacher`, train: options of `switchkd train`}}: values of the axis signal,
            beside those of `cache` and of the distilled stages; `train: {teacher_mode: live}` reads no store
    evaluate: options of `switchkd eval`: data, or tasks (benchmarks by name) and benchmarks (their folder)
    matrix: axes (objective, switch, scheme, teacher, student, signal, seed), each a value or a list; or a list of such mappings.
            The axes align_weight, vsd_weight, lr and steps are options of the fine-tuning stage that differ between cells
    compare: {arms: {NAME: values of axes}, pairs: [[NAME, NAME]]}: paired tests between arms over seeds, see `comparisons.py`

A cell is one point of the matrix, see `cells.py`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.pipelines.ablation.cells import AXES, DISTILLED, OPTION_AXES, Cell, cells_of, is_of_arm, require_known
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions
from switchkd.pipelines.options import fields_of, value_of_option
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import STAGES

SHIPPED = Path(__file__).parent / "recipes"
_KEYS = {
    "title",
    "base",
    "variables",
    "defaults",
    "notes",
    "easy_vqa",
    "emoji_vqa",
    "teachers",
    "students",
    "stages",
    "cache",
    "signals",
    "evaluate",
    "matrix",
    "compare",
}
_VARIABLE = re.compile(r"\$\{(\w+)\}")
# Options that are set by a recipe's cells.
_DECIDED: dict[type, set[str]] = {
    TrainOptions: {"student", "output", "teacher", "cache", "stage", "objective", "switch", "seed"},
    CacheOptions: {"teacher", "data", "images", "out", "template", "max_length", "image_mode", "max_pixels", "shard"},
    EvalOptions: {"model", "output", "baseline"},
    BenchmarkOptions: {"model", "output", "score_only", "baseline"},
}
# What is evaluated on: a recipe that names one replaces the other in its base.
_ON_FILE, _ON_BENCHMARKS = {"data", "images"}, {"tasks", "benchmarks"}


@dataclass(frozen=True)
class Comparison:
    """Arms of an ablation, each named by values of its cells' axes, and the pairs that are compared."""

    arms: Mapping[str, Mapping[str, Any]]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe with every variable replaced, reduced to what its cells need."""

    name: str
    title: str
    notes: str
    cells: tuple[Cell, ...]
    teachers: Mapping[str, Any]
    students: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]  # stage → options of TrainOptions
    cache: Mapping[str, Any]
    signals: Mapping[str, Mapping[str, Mapping[str, Any]]]  # name → cache, train → options
    evaluate: Mapping[str, Any]  # of BenchmarkOptions if it names tasks, else of EvalOptions
    easy_vqa: Mapping[str, Any] | None
    emoji_vqa: Mapping[str, Any] | None
    compare: Comparison | None


def shipped_recipes() -> dict[str, str]:
    """Return the recipes in the package: name → title. Recipes that only serve as a base of others are left out."""
    found = {path.stem: _read_with_base(path, ()) for path in sorted(SHIPPED.glob("*.yaml"))}
    return {name: content["title"] for name, content in found.items() if "matrix" in content}


def read_recipe(name_or_path: str, settings: Mapping[str, str], workdir: Path) -> Recipe:
    """Read a shipped recipe by name, or a recipe file.

    Args:
        settings: variable → value as YAML text. workdir: value of ${workdir}.

    Raises:
        ConfigError: no such recipe, or an error in it; names the entry.
    """
    path = SHIPPED / f"{name_or_path}.yaml"
    path = path if path.is_file() else Path(name_or_path)
    content = _read_with_base(path, ())
    if "matrix" not in content:
        raise ConfigError(f"recipe {path} has no matrix, so nothing to run; it serves as a base of others")
    fill = _Fill(_variables(path, content, settings) | {"workdir": str(workdir)})
    matrix = fill(content["matrix"])
    fill.require_all(path, content)
    cells = cells_of(matrix, content, path)
    given = content.get("stages", {})
    require_known("stages", given, {"all", *STAGES}, path)
    teachers = {name: fill(content["teachers"][name]) for name in _used(cell.teacher for cell in cells)}
    students = {name: fill(content["students"][name]) for name in _used(cell.student for cell in cells)}
    trained = {
        (name, stage): options for name, teacher in teachers.items() for stage, options in _training(teacher, path)
    }
    names = _used([*(stage for cell in cells for stage in cell.stages), *(stage for _, stage in trained)])
    stages = {name: fill(_stage(given, name)) for name in names}
    cache, evaluation = fill(content.get("cache", {})), fill(content.get("evaluate", {}))
    easy_vqa, emoji_vqa = (fill(content[key]) if key in content else None for key in ("easy_vqa", "emoji_vqa"))
    if easy_vqa is not None and emoji_vqa is not None:
        raise ConfigError(f"recipe {path}: easy_vqa and emoji_vqa both make data: leave one out")
    compare = _comparison(fill(content["compare"]), cells, path) if "compare" in content else None
    notes = str(fill(content.get("notes", "")))
    fill.require_all(path, content)
    for name in names:
        if "data" not in stages[name]:
            raise ConfigError(f"recipe {path}: stages: {name} gives no data file")
    kind = _check_evaluation(evaluation, path)
    if compare is not None and (kind is BenchmarkOptions or "limit" in evaluation):
        raise ConfigError(f"recipe {path}: compare reads all answers to a data file: evaluate on data, without a limit")
    for (name, stage), options in trained.items():
        teachers[name]["train"][stage] = _options(
            TrainOptions, stages[stage] | options, f"teachers: {name}: train: {stage}", path
        )
    return Recipe(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        notes=notes,
        cells=cells,
        teachers=teachers,
        students=students,
        stages={name: _options(TrainOptions, stages[name], f"stages: {name}", path) for name in names},
        cache=_options(CacheOptions, cache, "cache", path),
        signals={name: _signal(fill(content["signals"][name]), name, path) for name in _used(c.signal for c in cells)},
        evaluate=_options(kind, evaluation, "evaluate", path),
        easy_vqa=easy_vqa,
        emoji_vqa=emoji_vqa,
        compare=compare,
    )


def _check_evaluation(given: Mapping[str, Any], path: Path) -> type:
    """Return the class of an evaluation's options; raises ConfigError unless it is on a data file or on benchmarks."""
    if "tasks" not in given:
        if "data" not in given:
            raise ConfigError(f"recipe {path}: evaluate gives no data file, and no tasks (benchmarks by name)")
        return EvalOptions
    if not isinstance(given["tasks"], list) or not given["tasks"]:
        raise ConfigError(f"recipe {path}: evaluate: tasks should be a list of benchmarks, found {given['tasks']!r}")
    if "benchmarks" not in given:
        raise ConfigError(f"recipe {path}: evaluate: tasks need benchmarks, the folder that holds their files")
    if both := sorted(_ON_FILE & given.keys()):
        raise ConfigError(f"recipe {path}: evaluate has both tasks and {both[0]}: give benchmarks or a data file")
    return BenchmarkOptions


def _used(names: Iterable[str | None]) -> list[str]:
    """Return the names that are not None, each once, in order."""
    return list(dict.fromkeys(name for name in names if name))


def _training(teacher: Any, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the training stages, with their options, of a teacher that the recipe trains."""
    stages = teacher.get("train", {}) if isinstance(teacher, dict) else {}
    if not isinstance(stages, dict) or not all(isinstance(options, dict) for options in stages.values()):
        raise ConfigError(f"recipe {path}: teachers: train should hold the options of pt and sft, found {stages!r}")
    require_known("teachers: train", stages, set(DISTILLED.values()), path)
    return list(stages.items())


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"recipe {path} is its own base")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(shipped_recipes())
        raise ConfigError(f"no recipe {str(path)!r}: pass a YAML file, or one of {names}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} should hold entries by name, found {type(content).__name__}")
    require_known("a recipe", content, _KEYS, path)
    for key in _KEYS - {"title", "base", "notes", "matrix"}:
        if key in content and not isinstance(content[key], dict):
            raise ConfigError(f"recipe {path}: {key} should hold entries by name, found {content[key]!r}")
    base = content.pop("base", None)
    if base is None:
        return content
    shipped = SHIPPED / f"{base}.yaml"
    return _merged(_read_with_base(shipped if shipped.is_file() else path.parent / base, (*seen, path)), content)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for here, there in ((_ON_FILE, _ON_BENCHMARKS), (_ON_BENCHMARKS, _ON_FILE)):
        if isinstance(base.get("evaluate"), Mapping) and here & dict(over.get("evaluate") or {}).keys():
            out["evaluate"] = {name: value for name, value in base["evaluate"].items() if name not in there}
    for key, value in over.items():
        both = key != "matrix" and isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def _variables(path: Path, content: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    needed, values = content.get("variables", {}), dict(content.get("defaults", {}))
    for name, text in settings.items():
        if name not in needed and name not in values:
            known = ", ".join(dict.fromkeys([*needed, *values])) or "none"
            raise ConfigError(f"recipe {path} has no variable {name!r}; there are {known}")
        values[name] = yaml.safe_load(text)
    return values


class _Fill:
    """Replaces ${NAME} in every text of an entry; a text that is only ${NAME} becomes the value itself, a list or a number."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.missing: dict[str, None] = {}

    def __call__(self, entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {name: self(value) for name, value in entry.items()}
        if isinstance(entry, list):
            return [self(value) for value in entry]
        if not isinstance(entry, str):
            return entry
        names = _VARIABLE.findall(entry)
        if unknown := [name for name in names if name not in self.values]:
            self.missing |= dict.fromkeys(unknown)
            return entry
        if len(names) == 1 and entry == f"${{{names[0]}}}":
            return self.values[names[0]]
        return _VARIABLE.sub(lambda found: str(self.values[found[1]]), entry)

    def require_all(self, path: Path, content: Mapping[str, Any]) -> None:
        """Raise ConfigError if a variable that is used has no value; names all of them."""
        if not self.missing:
            return
        meanings = content.get("variables", {})
        lines = [f"\n  --set {name}=…" + (f"  ({meanings[name]})" if name in meanings else "") for name in self.missing]
        raise ConfigError(f"recipe {path} also needs:{''.join(lines)}")


def _stage(given: Mapping[str, Any], stage: str) -> dict[str, Any]:
    options = dict(given.get("all", {}))
    for name in (DISTILLED.get(stage), stage):
        options |= given.get(name, {}) if name else {}
    return options


def _signal(given: Any, name: str, path: Path) -> dict[str, dict[str, Any]]:
    """Check what a signal changes of a store and of the training that reads it."""
    entry = f"signals: {name}"
    if not isinstance(given, Mapping) or not all(isinstance(options, Mapping) for options in given.values()):
        raise ConfigError(f"recipe {path}: {entry} should hold options below cache and train, found {given!r}")
    kinds = {"cache": CacheOptions, "train": TrainOptions}
    require_known(entry, given, set(kinds), path)
    if decided := sorted({*OPTION_AXES, "train_parts"} & given.get("train", {}).keys()):
        raise ConfigError(f"recipe {path}: {entry}: {decided[0]} is the cell's or the stage's: give it there")
    return {what: _options(kind, given.get(what, {}), f"{entry}: {what}", path) for what, kind in kinds.items()}


def _options(kind: type, given: Mapping[str, Any], entry: str, path: Path) -> dict[str, Any]:
    """Check options by name, and convert YAML values to the types of an options class."""
    require_known(entry, given, set(fields_of(kind)) - _DECIDED[kind], path)
    try:
        return {name: value_of_option(kind, name, value) for name, value in given.items()}
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {entry}: {error}") from None


def _comparison(given: Any, cells: Iterable[Cell], path: Path) -> Comparison:
    """Check that the arms of a comparison are cells of the matrix, one for each seed."""
    if not isinstance(given, Mapping) or given.keys() != {"arms", "pairs"} or not isinstance(given["arms"], Mapping):
        raise ConfigError(f"recipe {path}: compare should hold arms, by name, and pairs of names; found {given!r}")
    arms, pairs = given["arms"], given["pairs"]
    for name, axes in arms.items():
        if not isinstance(axes, Mapping):
            raise ConfigError(f"recipe {path}: compare: the arm {name} should hold axes by name, found {axes!r}")
        require_known(f"compare: the arm {name}", axes, {*AXES, *OPTION_AXES} - {"seed"}, path)
        seeds = [cell.seed for cell in cells if is_of_arm(cell, axes)]
        if not seeds or len(seeds) != len(set(seeds)):
            raise ConfigError(
                f"recipe {path}: compare: the arm {name} should be one cell of the matrix for each seed, it is "
                f"{counted(len(seeds), 'cell')}"
            )
    if not isinstance(pairs, list) or not all(
        isinstance(p, list) and len(p) == 2 and set(p) <= arms.keys() for p in pairs
    ):
        raise ConfigError(f"recipe {path}: compare: pairs should be pairs of {', '.join(arms)}, found {pairs!r}")
    return Comparison(arms, tuple((one, other) for one, other in pairs))
