"""The settings of training runs for the report: what each learned from, which parts of it trained, what was left at its default."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from switchkd.pipelines.options import fields_of, shown
from switchkd.pipelines.reporting.inputs import TrainRun
from switchkd.pipelines.reporting.page import Details, Table
from switchkd.pipelines.training.options import TrainOptions
from switchkd.stores import TeacherStore

# Options that a table of the section tells already, or that name a place on the disk.
TOLD = {"output", "student", "teacher", "data", "images", "cache", "objective", "switch"}
# Without a default value in the record: the run decides them when it begins, from the machine, the student and the data.
DECIDED = {"precision", "accumulation", "global_batch", "workers", "group_by"}


def settings_table(runs: Sequence[TrainRun], stores: Sequence[tuple[str, TeacherStore]]) -> Table:
    """Return what each run learned from, in words: objective, teacher, payload, store, data, and what of the student trains."""
    head = ["run", "objective", "teacher", "teacher's signal", "store", "student", "trains", "data", "held-out samples"]
    rows = []
    for run in runs:
        options = run.options
        objective = f"{options.get('objective')}{' + switch' if options.get('switch') else ''}"
        teacher = "" if options.get("teacher") is None else f"{options['teacher']} ({options.get('teacher_mode')})"
        cells = [objective, teacher, options.get("teacher_signal") or "", _store(run, stores)]
        cells += [str(options.get("student", "")), _trained(options), _data(options), _held_out(options)]
        rows.append([run.label, *cells])
    used = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    return Table([head[i] for i in used], [[row[i] for i in used] for row in rows])


def mixture_table(runs: Sequence[TrainRun]) -> Table:
    """Return the data files of runs that were trained on a mixture, and how many samples of each an epoch has."""
    head = ["run", "entry", "data file", "samples an epoch", "usable", "rows", "weight or cap", "template", "store"]
    rows = []
    for run in runs:
        for name, about in run.options.get("mixture", {}).items():
            counts = [f"{about[key]:,}" for key in ("samples_per_epoch", "usable", "rows")]
            said = [str(about.get(key, "")) for key in ("share", "template", "store")]
            rows.append([run.label, name, about["data"], *counts, *said])
    return Table(head, rows)


def settings_of(run: TrainRun) -> Details:
    """Return the options of a run that differ from their default, and those that were left there, as words.

    The record of an earlier version lacks options of later ones; they are left out.
    """
    changed, left = {}, {}
    for name, field in fields_of(TrainOptions).items():
        default = field.get_default(call_default_factory=True)
        if name in TOLD or name not in run.options or default is PydanticUndefined:
            continue
        value = run.options[name]
        if value == (list(default) if isinstance(default, tuple) else default):
            left[name] = shown(field).unset or "none" if value in (None, [], {}) else _words(value)
        else:
            changed[name] = _words(value) + (" (given, or decided by the run)" if name in DECIDED else "")
    return Details(
        f"{run.label}: {len(changed)} options other than their default, {len(left)} left at it",
        {"Other than the default": changed, "Left at the default": left},
    )


def learned_from(run: TrainRun, store: TeacherStore) -> bool:
    """Return whether a run learned from a store."""
    return store.manifest.identity in str(run.options.get("teacher_signal"))


def _store(run: TrainRun, stores: Sequence[tuple[str, TeacherStore]]) -> str:
    """Name the stores that a run learned from, by their labels in the report if they were given to it."""
    if not run.options.get("cache"):
        return ""
    return ", ".join(label for label, store in stores if learned_from(run, store)) or str(run.options["cache"])


def _trained(options: Mapping[str, Any]) -> str:
    """Name the parts of the student that train, and how."""
    parts = str(options.get("train_parts", "")).replace(",", ", ")
    if options.get("lora") is None:
        return parts
    rank = options["lora"]
    alpha = 2 * rank if options.get("lora_alpha") is None else options["lora_alpha"]
    words = [f"LoRA of rank {rank}", f"alpha {alpha:g}", f"dropout {options.get('lora_dropout') or 0:g}"]
    words.append(f"in {(options.get('lora_parts') or 'language').replace(',', ', ')}")
    if options.get("lora_targets"):
        words.append(f"layers {options['lora_targets']}")
    return f"{parts}; {', '.join(words)}"


def _data(options: Mapping[str, Any]) -> str:
    mixture = options.get("mixture")
    return f"{options.get('data', '')}{f', a mixture of {len(mixture)} data files' if mixture else ''}"


def _held_out(options: Mapping[str, Any]) -> str:
    if options.get("eval_data") is None:
        return ""
    best = f"; best kept by {options['keep_best']}" if options.get("keep_best") else ""
    teacher = "" if options.get("eval_cache") is None else f", teacher from {options['eval_cache']}"
    return f"{options['eval_data']}{teacher}{best}"


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
