"""Training: train a student on a data file with CE + λ1·Align + λ2·VSD, Align from a teacher store, VSD computed online."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from switchkd.data.encoding import pad_id_of
from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import SUMMARY, record, to_plain, write_atomically
from switchkd.pipelines.training.arguments import training_arguments
from switchkd.pipelines.training.checkpointing import last_checkpoint
from switchkd.pipelines.training.collator import Collator, placeholder_sample
from switchkd.pipelines.training.failures import report_last_checkpoint
from switchkd.pipelines.training.inputs import TrainingInputs, open_inputs, resolve_options
from switchkd.pipelines.training.model_setup import TrainingModels, set_up_models
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions
from switchkd.pipelines.training.parallelism import require_checkpoint
from switchkd.pipelines.training.plot import plot_run
from switchkd.pipelines.training.run_log import RunReport, tell_plan
from switchkd.pipelines.training.trainer import SwitchTrainer

# Older versions cannot run Llava's LM head at selected rows only; capture needs 5.16 or newer.
OLDEST_TRANSFORMERS = Version("5.22")


@dataclass(frozen=True)
class TrainSummary:
    """The result of a run."""

    output: Path
    steps: int
    samples: int  # usable
    skipped: dict[str, int]  # by reason
    losses: dict[str, float]  # mean over the last logged interval, nats per position
    already_finished: bool


def train(options: TrainOptions) -> TrainSummary:
    """Train a student, or resume an interrupted run; returns immediately if the run is finished.

    Raises:
        InputError: something given cannot be used, or store, teacher, student and data do not fit; before the first step.
        StoreMismatch: during the run, a sample that is not the one that was cached.
        RunError: the run cannot go on, see `failures.report_last_checkpoint`.
    """
    _require_transformers()
    options = resolve_options(options)
    if (options.output / SUMMARY).is_file():
        record(options.output, to_plain(options), RESUMABLE_CHANGES)
        return _finished(options)
    inputs = open_inputs(options)
    arguments = training_arguments(options, inputs.store, len(inputs.samples))
    resume = last_checkpoint(options.output)
    if resume is not None:
        require_checkpoint(options.profile, resume, arguments.world_size)
    made_from = {"teacher_signal": inputs.teacher_signal}
    record(options.output, to_plain(options) | made_from, RESUMABLE_CHANGES, later=made_from)

    models = set_up_models(inputs, arguments)
    tell_plan(inputs, arguments, models.cost_model, models.unused, resume)
    trainer = _make_trainer(inputs, models, arguments)
    with report_last_checkpoint(options.output):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return _finish(inputs, trainer)


def _require_transformers() -> None:
    if Version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"training needs transformers {OLDEST_TRANSFORMERS} or newer, found {transformers.__version__}; "
            "an environment for vLLM only caches: train in another"
        )


def _make_trainer(inputs: TrainingInputs, models: TrainingModels, arguments: TrainingArguments) -> SwitchTrainer:
    options, student = inputs.options, inputs.student
    reads_otherwise = inputs.teacher if inputs.two_views else None
    collator = Collator(
        pad_id_of(student.tokenizer),
        None if options.profile == "ddp" else placeholder_sample(student, reads_otherwise),
        None if inputs.store is None else inputs.samples.payload,
        pad_id_of((inputs.teacher or student).tokenizer),
        options.packing,
    )
    trainer = SwitchTrainer(
        objective=inputs.objective,
        source=models.source,
        teacher=models.switch_teacher,
        extra_terms=models.extra_terms,
        vocab_map=inputs.vocabularies,
        group_by=options.group_by,
        cost_model=models.cost_model,
        peak_tflops=options.peak_tflops,
        part_rates=options.part_rates(),
        model=models.student,
        args=arguments,
        train_dataset=inputs.samples,
        data_collator=collator,
        processing_class=[student.tokenizer, student.image_processor],  # saved with every checkpoint, see SwitchTrainer
    )
    trainer.remove_callback(PrinterCallback)
    assert options.global_batch is not None  # resolved
    trainer.add_callback(RunReport(len(inputs.samples), options.global_batch))
    return trainer


def _finish(inputs: TrainingInputs, trainer: SwitchTrainer) -> TrainSummary:
    options, samples = inputs.options, inputs.samples
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
            "teacher_signal": inputs.teacher_signal,
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
