"""The inputs of a training run: opened, and checked against each other, before a model is loaded."""

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from switchkd.data.encoding import SampleEncoder
from switchkd.data.media import MediaReader
from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import hash_image_processor
from switchkd.losses.cross_tokenizer import VocabMap
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import (
    Checkpoint,
    check_compatible,
    check_student,
    open_checkpoint,
    with_image_mode,
)
from switchkd.models.families import FAMILIES, family_of
from switchkd.models.lora import check_targets, has_peft
from switchkd.models.packing_probe import check_packing
from switchkd.models.pair import check_pair
from switchkd.pipelines.cores import local_processes, workers_beside
from switchkd.pipelines.mixture import mixture_at
from switchkd.pipelines.stored_teacher import topk_caution
from switchkd.pipelines.training import cross_tokenizer
from switchkd.pipelines.training.batches.dataset import OrderedSamples
from switchkd.pipelines.training.batches.mixture import MixedSamples
from switchkd.pipelines.training.held_out.inputs import HeldOut, open_held_out
from switchkd.pipelines.training.int8_teacher import check_int8
from switchkd.pipelines.training.joining import JoinedFile, encoders_of, join, read_samples
from switchkd.pipelines.training.mixing import join_entries, read_entries, record_of
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.resuming import as_begun, resolve_batches
from switchkd.stores import TeacherStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a run, opened and checked; no model weights have been read yet."""

    options: TrainOptions  # resolved, see `resolve_options`
    objective: Objective
    parts: frozenset[str]  # the student's trainable parts
    student: Checkpoint  # with the image mode of the run
    teacher: Checkpoint | None  # None where no teacher was named, or the objective has none
    teachers: tuple[Checkpoint, ...]  # of the stores, those that were named; one but for a mixture of stores of several
    stores: tuple[TeacherStore, ...]  # complete, of each data file; none with a live teacher, or without one
    payload: str | None  # of the stores, "topk" or "hidden"; None without a store
    samples: OrderedSamples
    vocabularies: VocabMap | None  # with `--vocab-map`
    two_views: bool  # whether the teacher encodes samples differently from the student
    media: dict[str, Tensor] | None = None  # of one image, as the student's processor makes it; None for a Llava
    teacher_media: dict[str, Tensor] | None = None  # of the same image, as the teacher's makes it
    held_out: HeldOut | None = None
    mixture: dict[str, dict[str, Any]] | None = None  # entry → what is recorded of it; None for one data file

    @property
    def mixture_record(self) -> dict[str, Any]:
        """What a run records of its mixture, under the key "mixture"; nothing for one data file."""
        return {} if self.mixture is None else {"mixture": self.mixture}

    @property
    def teacher_signal(self) -> str | None:
        """Where the teacher's logits come from, in words; None for an objective that reads none."""
        if not self.objective.needs_signal:
            return None
        if self.options.teacher_mode == "live":
            return "live teacher"
        if not self.stores or self.payload is None:  # in a dry run alone
            return "hidden states of a store that is still to be made"
        tail = f", tail {self.options.tail}" if self.payload == "topk" else ""
        told = [f"{of.manifest.describe(self.payload)}{tail}; store {of.manifest.identity}" for of in self.stores]
        if isinstance(self.samples, MixedSamples):
            return " | ".join(f"{file.name}: {words}" for file, words in zip(self.samples.files, told, strict=True))
        return told[0]

    @property
    def caution(self) -> str | None:
        """What to know about the objective's error with this signal; None where there is nothing."""
        if not self.stores or self.payload != "topk" or not self.objective.name.startswith("dbild"):
            return None
        return topk_caution(self.stores[0].manifest, self.objective.window)


def resolve_options(options: TrainOptions, processes: int | None = None) -> TrainOptions:
    """Check options against this machine and against the run that they resume.

    Args:
        processes: of the run; None: as many as torchrun started.

    Returns:
        The options with a precision, the switch pathway on or off, and batch sizes and workers as numbers. `group_by` may still
        be None: it depends on the data.

    Raises:
        ConfigError: a package that they need is missing, or the global batch differs from the run's.
    """
    check_int8(options)
    if options.lora is not None and not has_peft():
        raise ConfigError("--lora trains through peft, which is not installed: pip install 'switchkd[lora]'")
    options = as_begun(options)
    if options.precision is None:
        options = replace(options, precision=precision_here())
    if options.switch is None:
        on = options.switch_adapter is not None or options.objective == "switch-ce" or _switches(options.student)
        options = replace(options, switch=on)
    if options.workers is None:
        options = replace(options, workers=workers_beside(local_processes()))
    return resolve_batches(options, int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes)


def _switches(student: Path) -> bool:
    """Whether the switch pathway is on by default for a student; not where its family's `switch_note` speaks against it."""
    try:
        kind = json.loads((student / "config.json").read_text(encoding="utf-8"))["model_type"]
        family = FAMILIES[kind]
    except (OSError, ValueError, LookupError, TypeError):
        return True  # `open_checkpoint` says what is wrong with it
    if family.switch_note:
        log.warning(
            "the switch pathway is off: %s is a %s, and %s. --switch turns it on", student, kind, family.switch_note
        )
    return not family.switch_note


def precision_here() -> Literal["float32", "bfloat16"]:
    """Return the precision to train in on this machine: bfloat16 where the GPU computes in it, not by emulation."""
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def open_inputs(options: TrainOptions) -> TrainingInputs:
    """Open student, teacher, store and data file, and compare them with each other; `options` are resolved.

    Raises:
        InputError: something given cannot be used, or store, teacher, student and data do not fit each other.
    """
    objective = options.as_objective()
    student = open_checkpoint(options.student, options.trust_remote_code)

    def open_teacher(options: TrainOptions) -> Checkpoint | None:
        opened = _open_teacher(options, objective, student)
        check_models(options, student, opened)
        return opened

    teacher = open_teacher(options)
    mixture = mixture_at(options.data)
    if mixture is None:
        joined = [join(options, objective, teacher, student)]
    else:
        joined = join_entries(mixture, options, objective, student, teacher, open_teacher)
    payload = joined[0].payload
    cross_tokenizer.check_vocab_map(options, teacher, payload)
    mode, max_pixels = joined[0].image_mode
    student = with_image_mode(student, mode, max_pixels)
    teacher = None if teacher is None else with_image_mode(teacher, mode, max_pixels)
    samples: OrderedSamples
    record = None
    if mixture is None:
        samples, teachers = read_samples(joined[0], student, teacher), [] if teacher is None else [teacher]
    else:
        samples, teachers = mixed, _ = read_entries(mixture, joined, student)
        record = record_of(mixture, mixed)
    other = samples.teacher_encoder
    if options.group_by is None:
        assert options.global_batch is not None  # resolved
        options = replace(options, group_by=samples.grouping(options.batch_size, options.global_batch, options.packing))
    vocabularies = cross_tokenizer.make_vocab_map(teacher, student, samples) if teacher and options.vocab_map else None
    return TrainingInputs(
        options=options,
        objective=objective,
        parts=options.as_parts(),
        student=student,
        teacher=teacher,
        teachers=tuple(teachers),
        stores=tuple(samples.stores),
        payload=payload,
        samples=samples,
        vocabularies=vocabularies,
        two_views=other is not None,
        media=_media_of_one_image(samples.encoder),
        teacher_media=None if teacher is None else _media_of_one_image(other or samples.encoder),
        mixture=record,
        held_out=_open_held_out(options, objective, joined[0], student, teacher, len(teachers), samples.fingerprint),
    )


def _open_held_out(
    options: TrainOptions,
    objective: Objective,
    joined: JoinedFile,
    student: Checkpoint,
    teacher: Checkpoint | None,
    teachers: int,
    trained: str,
) -> HeldOut | None:
    """Open the held-out samples, which are read as the first data file of the run is."""
    if options.eval_cache is not None and teachers > 1:
        raise ConfigError("--eval-cache goes with one teacher, and this mixture has several: leave it out")
    as_first = replace(joined.options, images=options.eval_images or joined.options.images)
    return open_held_out(
        options,
        objective,
        lambda: encoders_of(as_first, student, teacher, joined.store),
        joined.store,
        joined.payload,
        trained,
        workers=options.workers or 0,
        max_skipped=options.max_skipped,
        global_batch=options.global_batch or 1,
    )


def _media_of_one_image(encoder: SampleEncoder) -> dict[str, Tensor] | None:
    """Return the media of a made-up image, as an encoder's processor makes it; None for a Llava."""
    return encoder.reader.probe.columns if encoder.reader.is_variable else None


def check_models(options: TrainOptions, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Check that a run's models fit each other and its options, by their configs and processors.

    Args:
        teacher: None where the run opens none.

    Raises:
        CheckpointError, ConfigError: they do not; names both sides.
    """
    objective, live = options.as_objective(), options.teacher_mode == "live"
    llavas = all(family_of(side.config).is_llava for side in (student, teacher) if side is not None)
    check_student(student)
    student.require_whole_weights("train the checkpoint that it was made from")
    if teacher is not None and (objective.switch or live):
        teacher.require_whole_weights(
            "pass --no-switch to train from its store alone, or cache and pass the checkpoint that it was made from"
        )
    if (lora := options.as_lora(options.as_parts())) is not None:
        check_targets(student.config, lora)
    if objective.baseline and not llavas:
        raise CheckpointError(
            f"objective {objective.name} compares visual tokens and attention of two Llavas: {options.student} and "
            f"{options.teacher} are not; take another objective"
        )
    if options.attention_layer is not None and teacher is not None:
        depth = teacher.config.get_text_config().num_hidden_layers
        if options.attention_layer >= depth:
            raise ConfigError(
                f"--attention-layer {options.attention_layer}: the LLM of {options.teacher} has layers 0 to {depth - 1}"
            )
    if options.vsd_share not in (None, 1.0) and objective.switch and not llavas:
        raise CheckpointError(
            f"--vsd-share takes the features of some images of a batch, as two Llavas have them: {options.student} and "
            f"{options.teacher} are not; leave it out"
        )
    if options.packing is not None:
        check_packing(student.config, str(options.student))
        if teacher is not None and (objective.switch or live):
            check_packing(teacher.config, str(options.teacher))
    if teacher is None:
        return
    media = None
    if objective.switch and not llavas:
        media = (MediaReader(teacher).probe.columns, MediaReader(student).probe.columns)
    check_compatible(
        teacher,
        student,
        objective.switch,
        options.switch_adapter is not None,
        one_text=objective.baseline,
        vocab_map=options.vocab_map,
        media=media,
    )
    processors = {hash_image_processor(side.image_processor) for side in (teacher, student)}
    if live and llavas and len(processors) > 1:
        raise CheckpointError(
            f"--teacher-mode live shows both models the same pixels, but the image processors of {teacher.path} and "
            f"{student.path} differ; cache the teacher instead"
        )


def _open_teacher(options: TrainOptions, objective: Objective, student: Checkpoint) -> Checkpoint | None:
    if not objective.needs_teacher:
        if options.stage == "pt" and options.teacher is not None:
            check_pair(open_checkpoint(options.teacher, options.trust_remote_code), student)
        return None
    if options.teacher is None:
        if objective.switch:
            raise ConfigError("the switch pathway runs the teacher's projector and LLM: pass --teacher, or --no-switch")
        if options.teacher_mode == "live":
            raise ConfigError("--teacher-mode live runs the teacher: pass --teacher")
        return None
    return open_checkpoint(options.teacher, options.trust_remote_code)
