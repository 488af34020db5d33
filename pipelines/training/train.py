"""Stage two: train a student on a data file with CE + λ1·Align + λ2·VSD, Align from a teacher store, VSD live."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers.trainer_callback import PrinterCallback

from switchkd.data.encoding import pad_id_of
from switchkd.data.samples import SampleFile
from switchkd.errors import ConfigError
from switchkd.losses.baselines import BASELINES
from switchkd.models.block_attention import check_layers, enable_packing
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.models.vlm import enable_activation_checkpointing, freeze_unused_vision, load_model
from switchkd.pipelines.run_folder import SUMMARY, record, to_plain, write_atomically
from switchkd.pipelines.stored_teacher import StoredHidden
from switchkd.pipelines.training import cross_tokenizer
from switchkd.pipelines.training.arguments import _training_arguments, resolve_batches
from switchkd.pipelines.training.baseline_trainer import BaselineTrainer, make_baseline
from switchkd.pipelines.training.checkpointing import last_checkpoint
from switchkd.pipelines.training.collator import Collator, placeholder_sample
from switchkd.pipelines.training.cost_model import CostModel
from switchkd.pipelines.training.dataset import TrainingSamples
from switchkd.pipelines.training.failures import report_last_checkpoint
from switchkd.pipelines.training.inputs import _image_mode, _open_store, _open_teacher, _payload, encoders
from switchkd.pipelines.training.int8_teacher import check_int8
from switchkd.pipelines.training.model_setup import _load_teacher, make_switch_adapter
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions
from switchkd.pipelines.training.parallelism import (
    fit_fsdp,
    loading_whole,
    require_checkpoint,
    shard_frozen,
)
from switchkd.pipelines.training.plot import plot_run
from switchkd.pipelines.training.run_log import RunReport, tell_plan
from switchkd.pipelines.training.student_parts import freeze_other_parts
from switchkd.pipelines.training.teacher_source import LiveTeacher
from switchkd.pipelines.training.trainer import SwitchTrainer

# Older ones cannot run Llava's LM head at masked rows alone; what caching needs works from 5.16 on.
OLDEST_TRANSFORMERS = Version("5.22")
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
        RunError: the run cannot go on, see `stops.report_last_checkpoint`.
    """
    if Version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"training needs transformers {OLDEST_TRANSFORMERS} or newer, found {transformers.__version__}; "
            "an environment for vLLM only caches: train in another"
        )
    objective, parts = options.as_objective(), options.as_parts()
    check_int8(options)
    options = resolve_batches(options, int(os.environ.get("WORLD_SIZE", "1")))
    if (options.output / SUMMARY).is_file():
        record(options.output, to_plain(options), RESUMABLE_CHANGES)
        return _finished(options)
    student = open_checkpoint(options.student, options.trust_remote_code)
    teacher = _open_teacher(options, objective, student)
    if options.packing is not None:
        check_layers(student.config.text_config, str(options.student))
        if teacher is not None and (objective.switch or options.teacher_mode == "live"):
            check_layers(teacher.config.text_config, str(options.teacher))
    store = _open_store(options, objective, teacher, student)
    payload = _payload(options, store, teacher)
    cross_tokenizer.check_vocab_map(options, teacher, payload)
    student = with_image_mode(student, _image_mode(options, teacher, store))
    encoder, other = encoders(options, student, teacher, store)
    samples = TrainingSamples(SampleFile(options.data), encoder, store, options.workers, other)
    if store is not None and store.manifest.data != samples.samples.fingerprint:
        samples.require_same_texts()
    vocabularies = cross_tokenizer.make_vocab_map(teacher, student, samples) if teacher and options.vocab_map else None
    arguments = _training_arguments(options, store, len(samples))
    resume = last_checkpoint(options.output)
    if resume is not None:
        require_checkpoint(options.profile, resume, arguments.world_size)
    record(options.output, to_plain(options), RESUMABLE_CHANGES)

    with loading_whole(arguments):
        model = load_model(student, dtype="float32")
        source, switch_teacher = _load_teacher(options, objective, teacher, store, payload)
    live = source.teacher if isinstance(source, LiveTeacher) else None
    if options.packing is not None:
        enable_packing(model.model.language_model, str(options.student))
        if (packed := switch_teacher or live) is not None:
            enable_packing(packed.model.language_model, str(options.teacher))
    freeze_other_parts(model, parts)
    unused = freeze_unused_vision(model) if "vision" in parts else []
    if options.student_checkpointing:
        enable_activation_checkpointing(model.model.vision_tower, model.model.language_model, dropout=True)
    if options.switch_adapter is not None:
        assert teacher is not None
        model.switch_adapter = make_switch_adapter(options, teacher, student)
    baseline = objective.name in BASELINES
    if baseline:
        assert isinstance(source, LiveTeacher)
        source = make_baseline(options, model, source.teacher, source.vocab_rows)
    if arguments.fsdp:
        fit_fsdp(arguments, model)
        for whole in {source.teacher} if isinstance(source, LiveTeacher) else {switch_teacher} - {None}:
            shard_frozen(whole)
    stored_head = source.head.numel() if isinstance(source, StoredHidden) else 0
    footprint = CostModel(model, switch_teacher, live, stored_head, student.feature_tokens)
    tell_plan(options, arguments, samples, footprint, unused, resume)
    stand_in = None if options.profile == "ddp" else placeholder_sample(student, None if other is None else teacher)
    trainer = (BaselineTrainer if baseline else SwitchTrainer)(
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
    with report_last_checkpoint(options.output):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return _finish(options, trainer, samples)


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
        write_atomically(options.output / SUMMARY, json.dumps(summary, indent=1))
    return TrainSummary(options.output, summary["steps"], len(samples), summary["skipped"], summary["losses"], False)


def _finished(options: TrainOptions) -> TrainSummary:
    found = json.loads((options.output / SUMMARY).read_text())
    return TrainSummary(
        options.output, found["steps"], found["samples"], found["skipped"], found["losses"], already_finished=True
    )
