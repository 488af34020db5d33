"""Stage two: train a student on a data file with CE + λ1·Align + λ2·VSD, Align from a teacher store, VSD live."""

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import LlavaForConditionalGeneration, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from switchkd.block_attention import check_layers, prepare_rows
from switchkd.encoding import pad_id_of
from switchkd.errors import CheckpointError, ConfigError, StoreMismatch
from switchkd.fingerprints import hash_image_processor, hash_tokenizer
from switchkd.objective import Objective
from switchkd.peers import PEERS
from switchkd.pipelines import bridges, config
from switchkd.pipelines.config import TrainOptions
from switchkd.pipelines.footprint import Footprint
from switchkd.pipelines.int8_teacher import NAME as INT8
from switchkd.pipelines.int8_teacher import check_int8, to_int8
from switchkd.pipelines.peer_trainer import PeerTrainer, check_peer, make_peer
from switchkd.pipelines.plot_run import plot_run
from switchkd.pipelines.profiles import fit_fsdp, loading_whole, profile_arguments, require_checkpoint, shard_frozen
from switchkd.pipelines.resume_state import last_checkpoint
from switchkd.pipelines.stages import freeze_other_parts
from switchkd.pipelines.stops import naming_the_last_checkpoint
from switchkd.pipelines.teacher_source import LiveTeacher, StoredHidden, StoredTopK, TeacherSource
from switchkd.pipelines.train_report import RunReport, tell_plan
from switchkd.pipelines.trainer import SwitchTrainer
from switchkd.pipelines.training_data import Collator, TrainingSamples, stand_in_image
from switchkd.samples import SampleFile
from switchkd.stores import TeacherStore
from switchkd.stores.reader import pick_store
from switchkd.templates import load_template
from switchkd.vlm import (
    Checkpoint,
    checkpoint_layers,
    freeze,
    freeze_unused_vision,
    load_lm_head,
    load_model,
    open_checkpoint,
    require_fit,
    teacher_identity,
    with_image_mode,
)

# Older ones cannot run Llava's LM head at masked rows alone; what caching needs works from 5.16 on.
OLDEST_TRANSFORMERS = Version("5.22")
SUMMARY = "summary.json"  # written last; a run that has it is finished
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """What a run did."""

    output: Path
    steps: int
    samples: int  # usable
    skipped: dict[str, int]  # by reason
    losses: dict[str, float]  # mean over the last logged interval, nats per position
    already_finished: bool


def train(options: TrainOptions) -> TrainSummary:
    """Train a student, or go on with an interrupted run; returns at once if the run is finished.

    Raises:
        InputError: something given cannot be used, or store, teacher, student and data do not fit; before the first step.
        StoreMismatch: during the run, a sample that is not the one that was cached.
        RunError: the run cannot go on, see `stops.naming_the_last_checkpoint`.
    """
    if Version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"training needs transformers {OLDEST_TRANSFORMERS} or newer, found {transformers.__version__}; "
            "an environment for vLLM only caches: train in another"
        )
    objective, parts = options.as_objective(), options.as_parts()
    check_peer(options)
    check_int8(options)
    options = config.resolve_batches(options, int(os.environ.get("WORLD_SIZE", "1")))
    if (options.output / SUMMARY).is_file():
        config.record(options.output, config.plain(options))
        return _finished(options)
    student = open_checkpoint(options.student, options.trust_remote_code)
    teacher = _open_teacher(options, objective, student)
    if options.packing is not None:
        check_layers(student.config.text_config, str(options.student))
        if teacher is not None and (objective.switch or options.teacher_mode == "live"):
            check_layers(teacher.config.text_config, str(options.teacher))
    store = _open_store(options, objective, teacher, student)
    payload = _payload(options, store, teacher)
    bridges.check_vocab_map(options, teacher, payload)
    student = with_image_mode(student, _image_mode(options, teacher, store))
    encoder, other = bridges.encoders(options, student, teacher, store)
    samples = TrainingSamples(SampleFile(options.data), encoder, store, options.workers, other)
    if store is not None and store.manifest.data != samples.samples.fingerprint:
        samples.require_same_texts()
    vocabularies = bridges.make_vocab_map(teacher, student, samples) if teacher and options.vocab_map else None
    arguments = _training_arguments(options, store, len(samples))
    resume = last_checkpoint(options.output)
    if resume is not None:
        require_checkpoint(options.profile, resume, arguments.world_size)
    config.record(options.output, config.plain(options))

    with loading_whole(arguments):
        model = load_model(student, dtype="float32")
        source, switch_teacher = _load_teacher(options, objective, teacher, store, payload)
    live = source.teacher if isinstance(source, LiveTeacher) else None
    if options.packing is not None:
        prepare_rows(model.model.language_model, str(options.student))
        if (packed := switch_teacher or live) is not None:
            prepare_rows(packed.model.language_model, str(options.teacher))
    freeze_other_parts(model, parts)
    unused = freeze_unused_vision(model) if "vision" in parts else []
    if options.student_checkpointing:
        checkpoint_layers(model.model.vision_tower, model.model.language_model, dropout=True)
    if options.switch_adapter is not None:
        assert teacher is not None
        model.switch_adapter = bridges.make_switch_adapter(options, teacher, student)
    peer = objective.name in PEERS
    if peer:
        assert isinstance(source, LiveTeacher)
        source = make_peer(options, model, source.teacher, source.vocab_rows)
    if arguments.fsdp:
        fit_fsdp(arguments, model)
        for whole in {source.teacher} if isinstance(source, LiveTeacher) else {switch_teacher} - {None}:
            shard_frozen(whole)
    stored_head = source.head.numel() if isinstance(source, StoredHidden) else 0
    footprint = Footprint(model, switch_teacher, live, stored_head, student.feature_tokens)
    tell_plan(options, arguments, samples, footprint, unused, resume)
    stand_in = None if options.profile == "ddp" else stand_in_image(student, None if other is None else teacher)
    trainer = (PeerTrainer if peer else SwitchTrainer)(
        objective=objective,
        source=source,
        teacher=switch_teacher,
        vocab_map=vocabularies,
        group_by=options.group_by,
        footprint=footprint,
        peak_tflops=options.peak_tflops,
        part_rates=options.part_rates(),
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=Collator(
            pad_id_of(student.tokenizer),
            stand_in,
            None if store is None else samples.payload,
            pad_id_of((teacher or student).tokenizer),
            options.packing,
        ),
        processing_class=[student.tokenizer, student.image_processor],  # saved with every checkpoint, see SwitchTrainer
    )
    trainer.remove_callback(PrinterCallback)
    assert options.global_batch is not None  # resolved above
    trainer.add_callback(RunReport(len(samples), options.global_batch))
    with naming_the_last_checkpoint(options.output):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return _finish(options, trainer, samples)


def _open_teacher(options: TrainOptions, objective: Objective, student: Checkpoint) -> Checkpoint | None:
    if not objective.needs_teacher:
        return None
    if options.teacher is None:
        if objective.switch:
            raise ConfigError("the switch pathway runs the teacher's projector and LLM: pass --teacher, or --no-switch")
        if options.teacher_mode == "live":
            raise ConfigError("--teacher-mode live runs the teacher: pass --teacher")
        return None
    teacher = open_checkpoint(options.teacher, options.trust_remote_code)
    adapter, peer = options.switch_adapter is not None, objective.name in PEERS
    require_fit(teacher, student, objective.switch, adapter, one_text=peer, vocab_map=options.vocab_map)
    if options.teacher_mode == "live" and (
        hash_image_processor(teacher.image_processor) != hash_image_processor(student.image_processor)
    ):
        raise CheckpointError(
            f"--teacher-mode live shows both models the same pixels, but the image processors of {teacher.path} and "
            f"{student.path} differ; cache the teacher instead"
        )
    return teacher


def _open_store(
    options: TrainOptions, objective: Objective, teacher: Checkpoint | None, student: Checkpoint
) -> TeacherStore | None:
    """Open the store that fits the run; everything a manifest says is compared with what the run would use."""
    if options.teacher_mode not in ("cached", "live"):
        raise ConfigError(f"teacher mode is cached or live, got {options.teacher_mode!r}")
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
        if options.image_mode is not None:
            mine = with_image_mode(teacher, options.image_mode).image_processor
            wanted["image_processor"] = hash_image_processor(mine)
    if options.template is not None:
        wanted["template"] = load_template(options.template, teacher or student).as_dict()
    if options.max_length is not None:
        wanted["max_length"] = options.max_length
    store = pick_store(options.cache, wanted)
    store.require_whole()
    return store


def _image_mode(options: TrainOptions, teacher: Checkpoint | None, store: TeacherStore | None) -> str:
    """Return how images become square: as the run asks, else as the store says.

    Raises:
        StoreMismatch: the teacher's image processor is not the one that the store was made with.
    """
    if store is None:
        return options.image_mode or "own"
    manifest = store.manifest
    mode = options.image_mode or manifest.written_by.get("image_mode", "own")
    if teacher is not None:
        processor = hash_image_processor(with_image_mode(teacher, mode).image_processor)
        if misfits := manifest.misfits({"image_processor": processor}):
            raise StoreMismatch(f"{store.path} does not fit {teacher.path}: {misfits[0]}")
    return mode


def _payload(options: TrainOptions, store: TeacherStore | None, teacher: Checkpoint | None) -> str | None:
    """Choose which of a store's payloads to train from, "topk" or "hidden"; None without a store."""
    if store is None:
        return None
    manifest = store.manifest
    payload = options.payload or ("hidden" if manifest.has_hidden and teacher is not None else "topk")
    there = {"topk": manifest.has_topk, "hidden": manifest.has_hidden}
    if not there.get(payload):
        advice = "pass --teacher, whose LM head turns its states into logits" if manifest.has_hidden else "cache again"
        raise ConfigError(f"{store.path} holds payload {manifest.payload}, this run reads {payload}; {advice}")
    if payload == "hidden" and teacher is None:
        raise ConfigError("payload hidden needs the teacher's LM head: pass --teacher")
    if payload == "topk" and options.window is not None and options.window > manifest.top_k:
        raise ConfigError(
            f"--window {options.window} looks beyond the {manifest.top_k} logits a position that {store.path} holds; "
            f"pass --window {manifest.top_k} or cache with a larger --k"
        )
    return payload


def _teacher_dtype(options: TrainOptions, teacher: Checkpoint) -> str:
    """Return the dtype that the frozen weights are kept in, int8 layers aside; more bits than autocast's would never be used."""
    asked = "auto" if options.teacher_dtype == INT8 else options.teacher_dtype
    if asked == "auto" and options.precision == "bfloat16":
        return "bfloat16"
    return teacher.resolve_dtype(asked)


def _load_teacher(
    options: TrainOptions,
    objective: Objective,
    teacher: Checkpoint | None,
    store: TeacherStore | None,
    payload: str | None,
) -> tuple[TeacherSource | None, LlavaForConditionalGeneration | None]:
    """Load of the teacher what the run needs, and no more: (source of its word, model of the switch pathway)."""
    if not objective.needs_teacher:
        return None, None
    dtype = "" if teacher is None else _teacher_dtype(options, teacher)
    if store is None:
        assert teacher is not None
        whole = load_model(teacher, dtype=dtype)
        freeze(whole)
        if options.teacher_checkpointing:
            checkpoint_layers(whole.model.language_model)
        return LiveTeacher(whole, teacher.vocab_rows), whole if objective.switch else None
    switch = None
    if objective.switch:
        assert teacher is not None
        switch = load_model(teacher, vision=False, dtype=dtype)
        freeze(switch)
        if options.teacher_dtype == INT8:
            to_int8(switch.model.language_model)
        if options.teacher_checkpointing:
            checkpoint_layers(switch.model.language_model)
    if payload == "topk":
        return StoredTopK(store.manifest.vocab_rows, options.tail), switch
    assert teacher is not None
    head = load_lm_head(teacher, dtype) if switch is None else switch.lm_head.weight
    return StoredHidden(head, store.manifest.vocab_rows), switch


def _training_arguments(options: TrainOptions, store: TeacherStore | None, samples: int) -> TrainingArguments:
    """Translate the options; `trainer` entries go to transformers as they are. Raises ConfigError for an unknown one."""
    assert options.global_batch is not None
    steps = options.steps or math.ceil(options.epochs * samples / options.global_batch)
    arguments: dict[str, Any] = {
        "output_dir": str(options.output),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": steps,
        "learning_rate": options.lr,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": options.schedule,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.grad_clip,
        "bf16": options.precision == "bfloat16",
        "seed": options.seed,
        "logging_steps": options.log_every,
        "save_steps": options.save_every,
        "save_total_limit": 2,
        "dataloader_num_workers": options.workers,
        "remove_unused_columns": False,  # the collator's teacher columns are no arguments of the model
        "ddp_find_unused_parameters": False,  # every trainable parameter gets a gradient in every batch, see SwitchTrainer
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    if both := {"gradient_checkpointing", "activation_checkpointing"} & set(options.trainer):
        raise ConfigError(f"trainer: {min(both)} is for other models: pass --student-checkpointing")
    if options.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision is float32 or bfloat16, got {options.precision!r}")
    arguments |= profile_arguments(options.profile, os.environ) | options.trainer
    if store is not None and not store.place.survives_fork and arguments["dataloader_num_workers"]:
        arguments.setdefault("dataloader_multiprocessing_context", "spawn")
    try:
        made = TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training arguments: {error}") from error
    if made.n_gpu > 1:
        log.warning(
            "using one of %d GPUs; for all: torchrun --nproc-per-node %d --no-python switchkd train …",
            *[made.n_gpu] * 2,
        )
        made._n_gpu = 1  # else transformers would copy the model to all of them in every step (DataParallel)
    return made


def _finish(options: TrainOptions, trainer: SwitchTrainer, samples: TrainingSamples) -> TrainSummary:
    trainer.save_model()
    history = trainer.state.log_history
    last: dict[str, Any] = next((entry for entry in reversed(history) if "loss_ce" in entry), {})
    summary = {
        "steps": trainer.state.global_step,
        "samples": len(samples),
        "skipped": dict(samples.skipped),
        "losses": {name: value for name, value in last.items() if name.startswith("loss")},
        "history": history,
        "made_from": {
            "template": samples.encoder.template.as_dict(),
            "data": samples.samples.fingerprint,
            "store": None if samples.store is None else samples.store.manifest.identity,
            "teacher": None if samples.store is None else samples.store.manifest.teacher,
        },
    }
    if trainer.is_world_process_zero():
        plot_run(history, options.output)
        config.write_whole(options.output / SUMMARY, json.dumps(summary, indent=1))
    return TrainSummary(options.output, summary["steps"], len(samples), summary["skipped"], summary["losses"], False)


def _finished(options: TrainOptions) -> TrainSummary:
    found = json.loads((options.output / SUMMARY).read_text())
    return TrainSummary(
        options.output, found["steps"], found["samples"], found["skipped"], found["losses"], already_finished=True
    )
