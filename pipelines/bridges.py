"""What joins a student to a teacher of another shape or tokenizer: two encodings, a switch adapter, a map of vocabularies."""

import logging

import torch

from switchkd.encoding import SampleEncoder
from switchkd.errors import CheckpointError, ConfigError
from switchkd.peers import PEERS
from switchkd.pipelines.config import TrainOptions
from switchkd.pipelines.training_data import TrainingSamples
from switchkd.stores import TeacherStore
from switchkd.switch_adapter import SwitchAdapter
from switchkd.templates import load_template, template_from_dict
from switchkd.vlm import Checkpoint
from switchkd.vocab_map import VocabMap, map_vocabularies

PROBED = 64  # samples whose positions are aligned to tell how many have a partner
log = logging.getLogger(__name__)


def encoders(
    options: TrainOptions, student: Checkpoint, teacher: Checkpoint | None, store: TeacherStore | None
) -> tuple[SampleEncoder, SampleEncoder | None]:
    """Return the student's encoder, and the teacher's if it reads samples otherwise.

    A student whose images become more tokens than the teacher's, or whose tokenizer makes more of a text, may have longer samples.
    """
    if teacher is None or not (options.vocab_map or teacher.image_tokens != student.image_tokens):
        return _encoder(options, student, store), None
    longer = max(0, student.image_tokens - teacher.image_tokens)
    if options.vocab_map:
        longer = student.config.text_config.max_position_embeddings  # the model's bound; the tokenizer has none
    return _encoder(options, student, store, longer), _encoder(options, teacher, store)


def _encoder(
    options: TrainOptions, checkpoint: Checkpoint, store: TeacherStore | None, longer: int = 0
) -> SampleEncoder:
    """Encode as the store says that its samples were; without a store as the options say."""
    starts = options.vocab_map
    if store is None:
        template = load_template(options.template or "qwen2_base", checkpoint)
        return SampleEncoder(
            checkpoint, template, options.images, (options.max_length or 2048) + longer, with_starts=starts
        )
    manifest = store.manifest
    template = template_from_dict(manifest.template)
    length = manifest.max_length + longer
    return SampleEncoder(checkpoint, template, options.images, length, manifest.max_image_pixels, starts)


def make_switch_adapter(options: TrainOptions, teacher: Checkpoint, student: Checkpoint) -> SwitchAdapter:
    """Make the adapter that `options` ask for. Raises CheckpointError if features cannot be brought to the teacher's number."""
    torch.manual_seed(options.seed)
    shapes = [(side.feature_tokens, side.feature_width) for side in (student, teacher)]
    try:
        return SwitchAdapter(str(options.switch_adapter), *shapes)
    except ValueError as error:
        raise CheckpointError(f"--switch-adapter from {student.path} to {teacher.path}: {error}") from None


def check_vocab_map(options: TrainOptions, teacher: Checkpoint | None, payload: str | None) -> None:
    """Check that a run can map vocabularies if it is to.

    Raises:
        ConfigError: no teacher, one that is not known by whole rows, or an objective that compares one tokenizer's logits.
    """
    if not options.vocab_map:
        return
    if options.objective in PEERS:
        raise ConfigError(f"objective {options.objective} compares one tokenizer's logits: leave --vocab-map out")
    if teacher is None:
        raise ConfigError("--vocab-map maps the teacher's vocabulary: pass --teacher and an objective that has one")
    if payload == "topk":
        raise ConfigError("--vocab-map needs the teacher's whole rows: cache payload hidden, or --teacher-mode live")


def make_vocab_map(teacher: Checkpoint, student: Checkpoint, samples: TrainingSamples) -> VocabMap:
    """Map the vocabularies of two tokenizers, and tell how much of them and of the positions is shared.

    Raises:
        ConfigError: nothing is shared.
    """
    found = map_vocabularies(student.tokenizer, teacher.tokenizer, student.vocab_rows, teacher.vocab_rows)
    aligned = samples.aligned(PROBED)
    shared = len(found.student_ids)
    log.info(
        "vocabularies: %s entries shared, %.1f %% of the student's %s and %.1f %% of the teacher's %s",
        f"{shared:,}",
        100 * shared / found.student_rows,
        f"{found.student_rows:,}",
        100 * shared / found.teacher_rows,
        f"{found.teacher_rows:,}",
    )
    log.info("positions of the first %d samples: %.1f %% of the student's have a partner", PROBED, 100 * aligned)
    if not shared or not aligned:
        raise ConfigError(
            "--vocab-map: the two tokenizers share no entry or no position, so Align has nothing to compare"
        )
    return found
