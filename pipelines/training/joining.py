"""A data file joined with its teacher store: the store that fits is opened, and its settings make the encoders of the samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.samples import SampleFile
from switchkd.errors import ConfigError, StoreMismatch
from switchkd.fingerprints import hash_image_processor
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import Checkpoint, teacher_identity, with_image_mode
from switchkd.models.families import family_of
from switchkd.pipelines.stored_teacher import encoder_of_store
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.batches.switch_share import SwitchShare
from switchkd.pipelines.training.options import TrainOptions
from switchkd.stores import TeacherStore
from switchkd.stores.reader import pick_store


@dataclass(frozen=True)
class JoinedFile:
    """A data file and what is read of its store, opened and compared with the run; no sample has been read yet."""

    options: TrainOptions  # for this data file
    teacher: Checkpoint | None  # of the store; None where none was named, or the objective has none
    data: SampleFile
    store: TeacherStore | None  # complete; None with a live teacher, or without one
    payload: str | None  # of the store, "topk" or "hidden"; None without a store

    @property
    def image_mode(self) -> tuple[str, int | None]:
        """How images become square, and their limit of pixels; see `image_mode_of`."""
        return image_mode_of(self.options, self.teacher, self.store)


def join(
    options: TrainOptions, objective: Objective, teacher: Checkpoint | None, student: Checkpoint, files: int = 1
) -> JoinedFile:
    """Open a data file and the store that fits it and the run.

    Args:
        options: resolved, with the data file and where its store is. files: that are read at the same time; they share the memory
            in which a store keeps what was read last.

    Raises:
        InputError: data file or store cannot be used, or the store does not fit.
    """
    data = SampleFile(options.data)
    store = open_store(options, objective, teacher, student, data)
    if store is None:
        return JoinedFile(options, teacher, data, None, None)
    top_k = store.manifest.top_k if store.manifest.has_topk else None
    payload = choose_payload(options, str(store.path), top_k, store.manifest.has_hidden, teacher is not None)
    looks = options.weight_by is not None
    return JoinedFile(
        options, teacher, data, TeacherStore(store.path, store.cache_bytes // files, payload, looks), payload
    )


def read_samples(joined: JoinedFile, student: Checkpoint, teacher: Checkpoint | None) -> TrainingSamples:
    """Return the samples of a data file, joined with its store.

    Args:
        student, teacher: with the image mode of the run.

    Raises:
        StoreMismatch: the store was made from other samples. DataError: see `TrainingSamples`.
    """
    options, store = joined.options, joined.store
    encoder, other = encoders_of(options, student, teacher, store)
    share = None
    if options.switch and options.vsd_share is not None and options.vsd_share < 1:
        share = SwitchShare(options.vsd_share, options.seed)
    samples = TrainingSamples(joined.data, encoder, store, options.workers or 0, other, options.max_skipped, share)
    if store is not None and store.manifest.data != samples.fingerprint:
        samples.require_same_texts()
    return samples


def _preferences(
    options: TrainOptions, teacher: Checkpoint | None, samples: SampleFile
) -> list[Callable[[TeacherStore], bool]]:
    """Return what decides between several stores that fit: this data file, completeness, and what is read of it.

    Where positions are weighted by the visual advantage, a store that holds it. Without `--payload`, hidden states win over top-k
    logits where a teacher can read them, since they are nearer to it.
    """
    topk = options.payload == "topk" or (options.payload is None and teacher is None)
    return [
        lambda store: len(store) == len(samples),
        lambda store: store.manifest.data == samples.fingerprint,
        lambda store: len(store.parts()) == store.manifest.part_count,
        lambda store: options.weight_by is None or store.manifest.visual_advantage > 0,
        lambda store: store.manifest.has_topk if topk else store.manifest.has_hidden,
    ]


def open_store(
    options: TrainOptions,
    objective: Objective,
    teacher: Checkpoint | None,
    student: Checkpoint,
    samples: SampleFile,
) -> TeacherStore | None:
    """Open the store that fits the run; every entry of its manifest is compared with what the run would use."""
    if not objective.needs_signal or options.teacher_mode == "live":
        return None
    if options.cache is None:
        raise ConfigError(
            f"objective {objective.name} reads a teacher store: pass --cache, --teacher-mode live, or "
            "--objective sft --no-switch"
        )
    wanted: dict[str, Any] = {
        "tokenizer": (teacher or student).tokenizer_hash,
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
    if options.weight_by is not None and not store.manifest.visual_advantage:
        raise ConfigError(
            f"{store.path} holds no visual advantage, which --weight-by {options.weight_by} reads: cache again into another --out "
            "with `switchkd cache-teacher --visual-advantage`, or leave --weight-by out"
        )
    return store


def image_mode_of(
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


def encoders_of(
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
