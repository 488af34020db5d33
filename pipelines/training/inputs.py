"""The inputs of a training run: opened, and checked against each other, before a model is loaded."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.media import MediaReader
from switchkd.data.samples import SampleFile
from switchkd.errors import CheckpointError, ConfigError, StoreMismatch
from switchkd.fingerprints import hash_image_processor, hash_tokenizer
from switchkd.losses.cross_tokenizer import VocabMap
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import (
    Checkpoint,
    check_compatible,
    check_student,
    open_checkpoint,
    teacher_identity,
    with_image_mode,
)
from switchkd.models.families import FAMILIES, family_of
from switchkd.models.packing_probe import check_packing
from switchkd.models.pair import check_pair
from switchkd.pipelines.cores import local_processes, workers_beside
from switchkd.pipelines.stored_teacher import encoder_of_store, topk_caution
from switchkd.pipelines.training import cross_tokenizer
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.batches.switch_share import SwitchShare
from switchkd.pipelines.training.int8_teacher import check_int8
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.resuming import as_begun, resolve_batches
from switchkd.stores import TeacherStore
from switchkd.stores.reader import pick_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a run, opened and checked; no model weights have been read yet."""

    options: TrainOptions  # resolved, see `resolve_options`
    objective: Objective
    parts: frozenset[str]  # the student's trainable parts
    student: Checkpoint  # with the image mode of the run
    teacher: Checkpoint | None  # None where no teacher was named, or the objective has none
    store: TeacherStore | None  # complete; None with a live teacher, or without one
    payload: str | None  # of the store, "topk" or "hidden"; None without a store
    samples: TrainingSamples
    vocabularies: VocabMap | None  # with `--vocab-map`
    two_views: bool  # whether the teacher encodes samples differently from the student
    media: dict[str, Tensor] | None = None  # of one image, as the student's processor makes it; None for a Llava
    teacher_media: dict[str, Tensor] | None = None  # of the same image, as the teacher's makes it

    @property
    def teacher_signal(self) -> str | None:
        """Where the teacher's logits come from, in words; None for an objective without a teacher."""
        if not self.objective.needs_teacher:
            return None
        if self.store is None or self.payload is None:
            return "live teacher"
        manifest = self.store.manifest
        tail = f", tail {self.options.tail}" if self.payload == "topk" else ""
        return f"{manifest.describe(self.payload)}{tail}; store {manifest.identity}"

    @property
    def caution(self) -> str | None:
        """What to know about the objective's error with this signal; None where there is nothing."""
        if self.store is None or self.payload != "topk" or not self.objective.name.startswith("dbild"):
            return None
        return topk_caution(self.store.manifest, self.objective.window)


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
    options = as_begun(options)
    if options.precision is None:
        options = replace(options, precision=precision_here())
    if options.switch is None:
        options = replace(options, switch=options.switch_adapter is not None or _switches(options.student))
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
    teacher = _open_teacher(options, objective, student)
    check_models(options, student, teacher)
    data = SampleFile(options.data)
    store = _open_store(options, objective, teacher, student, data)
    payload = None
    if store is not None:
        top_k = store.manifest.top_k if store.manifest.has_topk else None
        payload = choose_payload(options, str(store.path), top_k, store.manifest.has_hidden, teacher is not None)
    if store is not None and payload is not None:
        store = store.only(payload)
    cross_tokenizer.check_vocab_map(options, teacher, payload)
    mode, max_pixels = _image_mode(options, teacher, store)
    student = with_image_mode(student, mode, max_pixels)
    teacher = None if teacher is None else with_image_mode(teacher, mode, max_pixels)
    encoder, other = _encoders(options, student, teacher, store)
    samples = TrainingSamples(data, encoder, store, options.workers or 0, other, options.max_skipped, _share(options))
    if store is not None and store.manifest.data != samples.samples.fingerprint:
        samples.require_same_texts()
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
        store=store,
        payload=payload,
        samples=samples,
        vocabularies=vocabularies,
        two_views=other is not None,
        media=_media_of_one_image(encoder),
        teacher_media=None if teacher is None else _media_of_one_image(other or encoder),
    )


def _share(options: TrainOptions) -> SwitchShare | None:
    share = options.vsd_share
    return None if share in (None, 1.0) or not options.switch else SwitchShare(share, options.seed)


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
    if objective.baseline and not llavas:
        raise CheckpointError(
            f"objective {objective.name} compares visual tokens and attention of two Llavas: {options.student} and "
            f"{options.teacher} are not; take another objective"
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


def _preferences(
    options: TrainOptions, teacher: Checkpoint | None, samples: SampleFile
) -> list[Callable[[TeacherStore], bool]]:
    """Return what decides between several stores that fit: this data file, completeness, and the payload that is read.

    Without `--payload`, hidden states win over top-k logits where a teacher can read them, since they are nearer to it.
    """
    topk = options.payload == "topk" or (options.payload is None and teacher is None)
    return [
        lambda store: len(store) == len(samples),
        lambda store: store.manifest.data == samples.fingerprint,
        lambda store: len(store.parts()) == store.manifest.part_count,
        lambda store: store.manifest.has_topk if topk else store.manifest.has_hidden,
    ]


def _open_store(
    options: TrainOptions,
    objective: Objective,
    teacher: Checkpoint | None,
    student: Checkpoint,
    samples: SampleFile,
) -> TeacherStore | None:
    """Open the store that fits the run; every entry of its manifest is compared with what the run would use."""
    if not objective.needs_teacher or options.teacher_mode == "live":
        return None
    if options.cache is None:
        raise ConfigError(
            f"objective {objective.name} reads a teacher store: pass --cache, --teacher-mode live, or "
            "--objective sft --no-switch"
        )
    wanted: dict[str, Any] = {
        "tokenizer": hash_tokenizer((teacher or student).tokenizer),
        "image_tokens": (teacher or student).image_tokens,
    }
    if teacher is not None:
        wanted["teacher"] = teacher_identity(teacher, vision=False)
        if options.image_mode is not None or options.max_pixels is not None:
            mine = with_image_mode(teacher, options.image_mode or "own", options.max_pixels).image_processor
            wanted["image_processor"] = hash_image_processor(mine)
    if options.template is not None:
        wanted["template"] = load_template(options.template, teacher or student).as_dict()
    if options.max_length is not None:
        wanted["max_length"] = options.max_length
    store = pick_store(options.cache, wanted, _preferences(options, teacher, samples))
    store.check_complete()
    return store


def _image_mode(
    options: TrainOptions, teacher: Checkpoint | None, store: TeacherStore | None
) -> tuple[str, int | None]:
    """Return how images become square, and their limit of pixels: as the options request, else as the store's manifest specifies.

    Raises:
        StoreMismatch: the teacher's image processor is not the one that the store was made with.
    """
    if store is None:
        return options.image_mode or "own", options.max_pixels
    manifest = store.manifest
    mode, max_pixels = options.image_mode or manifest.image_mode, options.max_pixels or manifest.max_pixels
    if teacher is not None:
        processor = hash_image_processor(with_image_mode(teacher, mode, max_pixels).image_processor)
        if mismatches := manifest.mismatches({"image_processor": processor}):
            raise StoreMismatch(f"{store.path} does not fit {teacher.path}: {mismatches[0]}")
    return mode, max_pixels


def choose_payload(
    options: TrainOptions, store: str, top_k: int | None, hidden: bool, with_teacher: bool = True
) -> str:
    """Choose which of a store's payloads to train from, "topk" or "hidden".

    Args:
        store: its name in messages. top_k: logits a position that it holds; None without payload topk.
        hidden: whether it holds hidden states. with_teacher: whether the run opens the teacher, whose LM head reads them.

    Raises:
        ConfigError: it does not hold what the options ask for.
    """
    payload = options.payload or ("hidden" if hidden and with_teacher else "topk")
    there = {"topk": top_k is not None, "hidden": hidden}
    if not there[payload]:
        advice = "pass --teacher, whose LM head turns its states into logits" if hidden else "cache again"
        holds = " and ".join(name for name, here in there.items() if here)
        raise ConfigError(f"{store} holds payload {holds}, this run reads {payload}; {advice}")
    if payload == "hidden" and not with_teacher:
        raise ConfigError("payload hidden needs the teacher's LM head: pass --teacher")
    if payload == "topk" and options.window is not None and top_k is not None and options.window > top_k:
        raise ConfigError(
            f"--window {options.window} looks beyond the {top_k} logits a position that {store} holds; "
            f"pass --window {top_k} or cache with a larger --k"
        )
    return payload


def _encoders(
    options: TrainOptions, student: Checkpoint, teacher: Checkpoint | None, store: TeacherStore | None
) -> tuple[SampleEncoder, SampleEncoder | None]:
    """Return the student's encoder, and the teacher's if it encodes samples differently.

    The student's samples may be longer than the teacher's, if it has more tokens per image or a tokenizer that yields more tokens.
    """
    if teacher is None or not (options.vocab_map or _reads_images_otherwise(teacher, student)):
        return _encoder(options, student, store), None
    longer = max(0, student.image_tokens - teacher.image_tokens)
    if options.vocab_map:
        longer = student.config.text_config.max_position_embeddings  # the model's limit; the tokenizer has none
    return _encoder(options, student, store, longer), _encoder(options, teacher, store)


def _reads_images_otherwise(teacher: Checkpoint, student: Checkpoint) -> bool:
    """Whether an image becomes other tokens, or other media, for the teacher; pixels alone do not count between two Llavas."""
    if teacher.image_tokens != student.image_tokens:
        return True
    if all(family_of(side.config).is_llava for side in (teacher, student)):
        return False
    kinds = [
        (family_of(side.config).model_type, hash_image_processor(side.image_processor)) for side in (teacher, student)
    ]
    return kinds[0] != kinds[1]


def _encoder(
    options: TrainOptions, checkpoint: Checkpoint, store: TeacherStore | None, longer: int = 0
) -> SampleEncoder:
    """Return an encoder with the settings in the store's manifest; without a store, with those of the options."""
    starts = options.vocab_map
    if store is None:
        template = load_template(options.template, checkpoint)
        return SampleEncoder(
            checkpoint, template, options.images, (options.max_length or 2048) + longer, with_starts=starts
        )
    return encoder_of_store(store.manifest, checkpoint, options.images, longer, starts)
