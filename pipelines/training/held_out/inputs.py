"""The held-out samples of a run: opened, compared with what the run trains from, and chosen, before a model is loaded."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import Sample, SampleFile
from switchkd.errors import ConfigError, DataError
from switchkd.losses.objective import Objective
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.option_groups.held_out import SAMPLES, HeldOutOptions
from switchkd.settings import StoreLocation
from switchkd.stores import Manifest, TeacherStore
from switchkd.stores.reader import pick_store

# Fields in which a store of held-out samples must be equal to the one that the run trains from.
_SAME = (
    "teacher", "tokenizer", "template", "image_processor", "image_tokens", "max_length", "max_image_pixels", "vocab_rows",
    "stats_dtype",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples, as a run evaluates its student by them."""

    samples: TrainingSamples
    chosen: list[int]  # of the usable samples, whose losses are computed; ascending
    questions: list[tuple[Sample, int]]  # (sample, its turn) to answer; similar lengths are neighbours
    with_teacher: bool  # whether Align, and with a switch pathway VSD, are computed
    ce_alone: bool  # whether CE is the whole objective
    every: int  # steps between two evaluations

    @property
    def identity(self) -> str:
        """What the metrics are made of, for `best.json`."""
        teacher = "without a teacher" if not self.with_teacher else "with the teacher"
        return f"{self.samples.samples.fingerprint}, {len(self.chosen)} samples, {len(self.questions)} questions, {teacher}"


def open_held_out(
    options: HeldOutOptions,
    objective: Objective,
    encoders: Callable[[], tuple[SampleEncoder, SampleEncoder | None]],
    store: TeacherStore | None,
    payload: str | None,
    trained: str,
    *,
    workers: int,
    max_skipped: float,
    global_batch: int,
) -> HeldOut | None:
    """Open the held-out samples of a run; None if it has none.

    Args:
        encoders: makes the encoders of student and teacher for the folder of the held-out images.
        store, payload: what the run trains from. trained: fingerprint of its data file.
        workers, max_skipped, global_batch: of the run.

    Raises:
        InputError: something cannot be used, the store does not fit the run's, or the metric of --keep-best is never computed.
    """
    if options.eval_data is None:
        return None
    data = SampleFile(options.eval_data)
    if data.fingerprint == trained:
        log.warning("warning: --eval-data is the data file that trains, so it says nothing about other samples")
    found = None
    if options.eval_cache is not None:
        assert store is not None and payload is not None
        found = _open_store(options.eval_cache, store.manifest, payload, data)
    encoder, other = encoders()
    samples = TrainingSamples(data, encoder, found, workers, other if found or store is None else None, max_skipped)
    if found is not None and found.manifest.data != data.fingerprint:
        samples.require_same_texts()
    chosen = spread(len(samples), options.eval_samples or SAMPLES)
    rows = [data[int(samples.usable[item])] for item in chosen]
    asked = [(row, turn) for row in rows for turn in range(len(row.turns))]
    questions = [asked[number] for number in spread(len(asked), options.answers())]
    questions.sort(key=lambda question: (question[0].image is None, len(question[0].turns[question[1]][0])))
    with_teacher = found is not None or (store is None and objective.needs_signal and not objective.baseline)
    if options.keep_best == "vsd" and not any(row.image is not None for row in rows):
        raise ConfigError(f"--keep-best vsd: no held-out sample of {data.path} has an image, so VSD is never computed")
    if options.keep_best == "vsd" and not objective.switch:
        raise ConfigError("--keep-best vsd: the switch pathway is off, so VSD is never computed; pass --switch")
    if options.keep_best == "exact-match" and not questions:
        raise DataError(f"--keep-best exact-match: {data.path} has no question to answer")
    every = options.every(len(chosen), global_batch)
    return HeldOut(samples, chosen, questions, with_teacher, not objective.needs_teacher, every)


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spaced."""
    found: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return found


def _open_store(location: StoreLocation, trained: Manifest, payload: str, data: SampleFile) -> TeacherStore:
    """Open the store of the held-out samples that fits the one that the run trains from."""
    wanted: dict[str, Any] = {name: getattr(trained, name) for name in _SAME}
    store = pick_store(
        location,
        wanted,
        [
            lambda one: len(one) == len(data),
            lambda one: one.manifest.data == data.fingerprint,
            lambda one: one.manifest.has_topk if payload == "topk" else one.manifest.has_hidden,
        ],
    )
    store.check_complete()
    if not (store.manifest.has_topk if payload == "topk" else store.manifest.has_hidden):
        raise ConfigError(
            f"--eval-cache {store.path} holds no payload {payload}, from which this run trains: cache the samples with it, or "
            "pass --payload"
        )
    return store.only(payload)
