"""The data files of a mixture, each joined with its store, and compared with each other before a sample is read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.data.load_template import load_template
from switchkd.errors import CheckpointError, ConfigError, StoreMismatch
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import Checkpoint, with_image_mode
from switchkd.pipelines.mixture import Mixture, MixtureEntry
from switchkd.pipelines.training.batches.mixture import MixedFile, MixedSamples
from switchkd.pipelines.training.joining import JoinedFile, join, read_samples
from switchkd.pipelines.training.options import TrainOptions
from switchkd.stores.storage.open import open_storage


def join_entries(
    mixture: Mixture,
    options: TrainOptions,
    objective: Objective,
    student: Checkpoint,
    teacher: Checkpoint | None,
    open_teacher: Callable[[TrainOptions], Checkpoint | None],
) -> list[JoinedFile]:
    """Open the data files of a mixture and their stores.

    Args:
        teacher: of `options`. open_teacher: opens that of an entry's own options, and compares it with the student.

    Raises:
        InputError: names the entry whose data, store or teacher cannot be used, or does not fit the run or the other entries.
    """
    opened: dict[Path | None, Checkpoint | None] = {options.teacher: teacher}
    joined = []
    for entry in mixture.entries:
        with mixture.naming(entry):
            own = options_of_entry(mixture, entry, options)
            if own.teacher not in opened:
                _require_no_switch(options)
                opened[own.teacher] = open_teacher(own)
            if own.template is not None:
                load_template(own.template, opened[own.teacher] or student)
            joined.append(join(own, objective, opened[own.teacher], student, len(mixture.entries)))
    _require_alike(mixture, joined)
    return joined


def options_of_entry(mixture: Mixture, entry: MixtureEntry, options: TrainOptions) -> TrainOptions:
    """Return the options of a run for one data file of its mixture.

    The store is the entry's own; without one NAME.zarr in the folder of `options.cache`, if that is there, else whichever store of
    that folder fits.
    """
    cache = options.cache if entry.store is None else entry.store
    if entry.store is None and cache is not None:
        named = mixture.store_of(entry, cache)
        cache = named if open_storage(named).exists() else cache
    return replace(
        options,
        data=entry.data,
        images=entry.images or options.images,
        template=entry.template or options.template,
        teacher=entry.teacher or options.teacher,
        cache=cache,
    )


def _require_no_switch(options: TrainOptions) -> None:
    """Raise ConfigError for a run that has one teacher only, where an entry names another."""
    for ask, what in (
        (options.switch, "the switch pathway runs one teacher: pass --no-switch"),
        (options.teacher_mode == "live", "--teacher-mode live runs one teacher"),
        (options.vocab_map, "--vocab-map maps the vocabulary of one teacher"),
    ):
        if ask:
            raise ConfigError(f"{what}, or leave out the entry's own teacher")


def _require_alike(mixture: Mixture, joined: Sequence[JoinedFile]) -> None:
    """Compare what the entries of a mixture must share, each with the first.

    Raises:
        StoreMismatch: names both entries, both values and what to do.
    """
    first, *others = zip(mixture.entries, joined, strict=True)
    for entry, file in others:
        for what, of, advice in _SHARED:
            values = of(first[1]), of(file)
            if values[0] != values[1]:
                raise StoreMismatch(
                    f"{mixture.path}: the entries of a mixture share their {what}; {first[0].name} has {values[0]}, {entry.name} "
                    f"has {values[1]}: {advice}"
                )


def _top_k(file: JoinedFile) -> int | None:
    return file.store.manifest.top_k if file.store is not None and file.payload == "topk" else None


def _image_mode(file: JoinedFile) -> str:
    mode, most = file.image_mode
    return mode if most is None else f"{mode} with at most {most:,} pixels"


# What entries share: its name, its value, and what to do where it differs.
_SHARED: tuple[tuple[str, Callable[[JoinedFile], Any], str], ...] = (
    ("payload", lambda file: file.payload, "pass --payload topk, if both have it, or cache again"),
    (
        "number of vocabulary rows",
        lambda file: None if file.store is None else file.store.manifest.vocab_rows,
        "their teachers need vocabularies of the same size",
    ),
    ("top k", _top_k, "cache again with the same --k"),
    ("image mode", _image_mode, "cache again with the same --image-mode and --max-pixels"),
)


def read_entries(
    mixture: Mixture, joined: Sequence[JoinedFile], student: Checkpoint
) -> tuple[MixedSamples, list[Checkpoint]]:
    """Return the samples of a mixture, and the teachers of its stores, as far as they were named.

    Args:
        student: with the image mode of the run.

    Raises:
        InputError: see `read_samples`; names the entry.
    """
    teachers: dict[Path, Checkpoint] = {}
    files: list[MixedFile] = []
    for entry, file in zip(mixture.entries, joined, strict=True):
        with mixture.naming(entry):
            teacher = None
            if file.teacher is not None:
                teacher = teachers.setdefault(file.teacher.path, with_image_mode(file.teacher, *file.image_mode))
            samples = read_samples(file, student, teacher)
            if files and (samples.teacher_encoder is None) != (files[0].samples.teacher_encoder is None):
                raise CheckpointError(
                    f"its teacher encodes samples otherwise than the student, and that of {files[0].name} does not: take teachers "
                    "with the same image processor"
                )
            number = 0 if teacher is None else list(teachers).index(teacher.path)
            files.append(MixedFile(entry.name, samples, entry.drawn(len(samples)), number))
    return MixedSamples(mixture.path, files, joined[0].options.max_skipped), list(teachers.values())


def record_of(mixture: Mixture, samples: MixedSamples) -> dict[str, dict[str, Any]]:
    """Return what a run records of its mixture, entry by entry, as YAML data."""
    found = {}
    for entry, file in zip(mixture.entries, samples.files, strict=True):
        part, stores = file.samples, file.samples.stores
        about: dict[str, Any] = {
            "data": str(entry.data),
            "share": entry.share() or None,
            "usable": len(part),
            "rows": part.rows,
            "samples_per_epoch": file.drawn,
            "template": part.encoder.template.as_dict().get("name"),
            "store": stores[0].manifest.identity if stores else None,
            "fingerprint": part.fingerprint,
        }
        found[entry.name] = {name: value for name, value in about.items() if value is not None}
    return found
