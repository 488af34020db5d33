"""Comparison of a trained student's knees with its teacher's, at the same positions (paper, eqs. 8-9)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from switchkd.data.encoded import collate, pad_id_of
from switchkd.data.samples import SampleFile
from switchkd.errors import ConfigError, InputError
from switchkd.fingerprints import hash_tokenizer
from switchkd.losses import kneedle
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.models.components import lm_head_of
from switchkd.models.vlm import freeze, load_model, states_at_positions
from switchkd.pipelines.drawing import TEACHER
from switchkd.pipelines.mixture import mixture_at
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.reporting.figures import histogram
from switchkd.pipelines.reporting.inputs import ITS_TEACHER, Inputs, TrainRun
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.page import Section
from switchkd.pipelines.reporting.run_settings import learned_from
from switchkd.pipelines.stored_teacher import choose_samples, encode_as_cached, encoder_of_store
from switchkd.stores import TeacherStore

BATCH = 8


def add_student_knees(section: Section, inputs: Inputs, options: ReportOptions) -> None:
    """Draw the knees of every finished run beside its teacher's, on samples of the stores that it learned from or of a chosen one.

    A run whose student cannot be run again is left out with a line that says why; it does not end the report.
    """
    finished = [run for run in inputs.trains if run.summary is not None]
    if not options.knees or not finished:
        section.missing.append(
            "The knees of students are left out: give finished runs, their stores, and `--knees N`, the number of samples to run "
            "them on."
        )
        return
    for run in finished:
        stores = _stores_of(run, inputs, options.knees_store)
        if not stores:
            section.missing.append(
                f"The knees of {run.label} are left out: it learned from none of the stores given; name one with `--knees-store`."
            )
        for label, store in stores:
            try:
                data = _data_of(store, run, inputs.trains)
                student, teacher = knees_beside(run, store, data, options.knees, options.device)
            except InputError as error:
                section.missing.append(f"The knees of {run.label} are left out: {error}")
                continue
            number = sum(figure.name.startswith("knees-student-") for figure in section.figures)
            title = f"Knees of {run.label} and its teacher"
            title += f" on samples of {label}" if len(inputs.stores) > 1 else ""
            groups, series = {run.label: student, ITS_TEACHER: teacher}, inputs.series | {ITS_TEACHER: TEACHER}
            section.figures.append(histogram(f"knees-student-{number}", title, groups, "k", series))
            section.notes.append(
                f"{title}: the same {len(student):,} positions, of at most {options.knees} random samples; medians "
                f"{np.median(student):,.0f} and {np.median(teacher):,.0f}."
            )


def _stores_of(run: TrainRun, inputs: Inputs, chosen: str | None) -> list[tuple[str, TeacherStore]]:
    """Return the stores on whose samples a run's student is run: the chosen one, its own, or the only one that is given."""
    if chosen is not None:
        return [(label, store) for label, store in inputs.stores if label == chosen]
    own = [(label, store) for label, store in inputs.stores if learned_from(run, store)]
    reads_none = run.options.get("cache") is None
    return own or (inputs.stores if reads_none and len(inputs.stores) == 1 else [])


def _data_of(store: TeacherStore, run: TrainRun, runs: Sequence[TrainRun]) -> tuple[SampleFile, Path | None]:
    """Return the data file that a store was made of, and its images: of the run, or else of another one.

    Raises:
        DataError: no run's data file can be read. ConfigError: none is that of the store.
    """
    unread: InputError | None = None
    tried: set[Path] = set()
    for other in (run, *runs):
        for path, images in _data_files(other):
            if path in tried:
                continue
            tried.add(path)
            try:
                data = SampleFile(path)
            except InputError as error:
                unread = unread or error
                continue
            if data.fingerprint == store.manifest.data:
                return data, images
    raise unread or ConfigError(f"{store.path} was made of another data file than those of the runs")


def _data_files(run: TrainRun) -> list[tuple[Path, Path | None]]:
    """Return the (data file, folder of images) of a run, several for a mixture; none if the mixture cannot be read."""
    data, images = Path(run.options["data"]), run.options.get("images")
    folder = None if images is None else Path(images)
    try:
        mixture = mixture_at(data)
    except InputError:
        return []
    if mixture is None:
        return [(data, folder)]
    return [(entry.data, entry.images or folder) for entry in mixture.entries]


def knees_beside(
    run: TrainRun, store: TeacherStore, data: tuple[SampleFile, Path | None], samples: int, device: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run a student over random samples of a store, and return (its knees, the teacher's), [P] each.

    Args:
        run: a finished training run. data: the store's data file and its folder of images.
        samples: their maximum number. device: of torch.

    Raises:
        ConfigError: the run's tokenizer differs from the store's. StoreMismatch: a sample changed since it was cached.
    """
    manifest = store.manifest
    checkpoint = with_image_mode(open_checkpoint(run.path), manifest.image_mode, manifest.max_pixels)
    if hash_tokenizer(checkpoint.tokenizer) != manifest.tokenizer:
        raise ConfigError(
            f"{run.path} and {store.path} have other tokenizers; report on them apart, or without --knees"
        )
    rows, images = data
    encoder = encoder_of_store(manifest, checkpoint, images)
    chosen = choose_samples(store, samples, seed=0)
    model: Any = freeze(load_model(checkpoint, dtype="float32")).to(device)
    of_student: list[NDArray[Any]] = [np.empty(0)]
    of_teacher: list[NDArray[Any]] = [np.empty(0)]
    with Progress(f"knees of {run.label}", len(chosen), "samples") as progress:
        for start in range(0, len(chosen), BATCH):
            indices = chosen[start : start + BATCH]
            batch = [encode_as_cached(encoder, rows, store, index) for index in indices]
            with torch.no_grad():
                states = states_at_positions(model, collate(batch, pad_id_of(checkpoint.tokenizer)))
                logits = lm_head_of(model).logits(states)[:, : manifest.vocab_rows]
            of_student.append(kneedle(logits.float()).cpu().numpy())
            of_teacher.append(store.payload(indices).stat("knee"))
            progress.advance(len(batch), positions=len(logits))
    return np.concatenate(of_student), np.concatenate(of_teacher)
