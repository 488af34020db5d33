"""Training: train a student on a data file with CE + λ1·Align + λ2·VSD, Align from a teacher store, VSD computed online."""

import json
import os
from collections import Counter
from itertools import groupby
from typing import Any

import torch
import transformers
import yaml
from packaging.version import Version
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

import switchkd
from switchkd.data.encoded import pad_id_of
from switchkd.errors import ConfigError, Stopped
from switchkd.fingerprints import hash_json, hash_weights
from switchkd.models.checkpoint import readers_of
from switchkd.pipelines.run_folder import RECORD, SUMMARY, check_record, read_record, sync, to_plain, write_atomically
from switchkd.pipelines.training.arguments import fit_to_data, training_arguments
from switchkd.pipelines.training.batches.collator import Collator, empty_sample, placeholder_sample
from switchkd.pipelines.training.batches.dataset import OrderedSamples
from switchkd.pipelines.training.failures import report_last_checkpoint
from switchkd.pipelines.training.held_out.best import BestStudent, read_best, recover_best
from switchkd.pipelines.training.held_out.evaluator import Evaluator
from switchkd.pipelines.training.inputs import TrainingInputs, open_inputs, resolve_options
from switchkd.pipelines.training.lifecycle.begun import has_begun, step_of
from switchkd.pipelines.training.lifecycle.lock import one_run
from switchkd.pipelines.training.lifecycle.sealed import agree_on_checkpoint
from switchkd.pipelines.training.lifecycle.stopping import Stopping, StopRequest, leave_group, stop_requests
from switchkd.pipelines.training.lifecycle.together import from_first_process
from switchkd.pipelines.training.loggers import open_loggers
from switchkd.pipelines.training.model_setup import TrainingModels, set_up_models
from switchkd.pipelines.training.option_groups.step import COMPILE
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions
from switchkd.pipelines.training.parallelism import check_processes, require_checkpoint
from switchkd.pipelines.training.plot import plot_run, title_of
from switchkd.pipelines.training.resuming import TrainSummary, finished
from switchkd.pipelines.training.run_log import EvaluationSchedule, RunReport, tell_plan
from switchkd.pipelines.training.step_ways import experimental
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.settings import OLDEST_FOR_TRAINING, absent_terms

SEALED = "checkpoints_have_digests"  # in the record of a run: a checkpoint without them is damaged, not old


def train(options: TrainOptions) -> TrainSummary:
    """Train a student, or resume an interrupted run; returns immediately if the run is finished.

    Raises:
        InputError: something given cannot be used, or store, teacher, student and data do not fit; before the first step.
        Stopped: a signal ended the run, after a checkpoint if a step was done.
        StoreMismatch: during the run, a sample that is not the one that was cached.
        RunError: the run cannot go on, see `failures.report_last_checkpoint`.
    """
    _require_transformers()
    check_processes(os.environ, torch.cuda.device_count())
    options = resolve_options(options)
    if (done := finished(options)) is not None:
        return done
    first = os.environ.get("RANK", "0") == "0"
    with stop_requests() as request, one_run(options.output, first):
        try:
            return _run(options, request)
        except Stopped:
            leave_group()
            raise


def _run(options: TrainOptions, request: StopRequest) -> TrainSummary:
    """Check everything, then record the options, then train; the order lets a refused command be corrected."""
    arguments = training_arguments(options)
    run, begun = options.output, has_begun(options.output)
    before = read_record(run) if begun else {}
    if begun:
        check_record(run, to_plain(options), RESUMABLE_CHANGES)
    resume = agree_on_checkpoint(run, sealed=SEALED in before)
    if resume is not None:
        require_checkpoint(options.profile, resume, arguments.world_size)
    experimental.begin(options.as_experimental(), arguments)
    inputs = open_inputs(options)
    options = inputs.options
    fit_to_data(arguments, options, inputs.stores, len(inputs.samples))
    made_from: dict[str, Any] = {
        "teacher_signal": inputs.teacher_signal,
        "samples": inputs.samples.order_identity(),
    }
    made_from |= inputs.mixture_record | _lora_base(inputs)
    if begun:
        check_record(run, made_from, later=made_from)

    best = _best_student(inputs)
    models = set_up_models(inputs, arguments)
    stopping = Stopping(request, options.save_minutes)
    trainer = _make_trainer(inputs, models, arguments, stopping, best)
    if models.extra_terms is not None:
        with trainer.accelerator.autocast():
            made_from |= models.extra_terms.prepare(
                inputs.samples, trainer.data_collator, arguments.device, recorded=before
            )
    if not before and trainer.is_world_process_zero():
        plain = yaml.safe_dump(to_plain(options) | made_from | ({} if begun else {SEALED: True}), sort_keys=False)
        write_atomically(run / RECORD, plain, durable=True)
    tell_plan(inputs, arguments.max_steps, arguments.world_size, models.cost_model, models.unused, resume)
    log_to = options.log_to if trainer.is_world_process_zero() else ()
    about = to_plain(options) | {"switchkd": switchkd.__version__, "made_from": _made_from(inputs)}
    with (
        report_last_checkpoint(run),
        open_loggers(log_to, run, arguments, about, None if resume is None else step_of(resume)) as loggers,
    ):
        for logger in loggers:
            trainer.add_callback(logger)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        stopping.require_end(run)
        return _finish(inputs, trainer)


def _lora_base(inputs: TrainingInputs) -> dict[str, str]:
    """Return the hash of the weights beside which LoRA trains: checkpoints hold them merged, so a resumed run reads them again."""
    lora = inputs.options.as_lora(inputs.parts)
    if lora is None:
        return {}
    return {"lora_base": hash_json(hash_weights(inputs.student.path, tuple(sorted(lora.parts))))}


def _best_student(inputs: TrainingInputs) -> BestStudent | None:
    """Return what keeps the best student; None if none was asked for. Every process of the run calls it."""
    options, held_out = inputs.options, inputs.held_out
    if options.keep_best is None or held_out is None:
        return None
    from_first_process(lambda: recover_best(options.output))
    about = {"made_from": _made_from(inputs)}
    return BestStudent(options.output, options.keep_best, held_out.identity, about)


def _require_transformers() -> None:
    if Version(transformers.__version__) < Version(OLDEST_FOR_TRAINING):
        raise ConfigError(
            f"training needs transformers {OLDEST_FOR_TRAINING} or newer, found {transformers.__version__}; "
            "an environment for vLLM only caches: train in another"
        )


def _make_trainer(
    inputs: TrainingInputs,
    models: TrainingModels,
    arguments: TrainingArguments,
    stopping: Stopping,
    best: BestStudent | None,
) -> SwitchTrainer:
    options, student = inputs.options, inputs.student
    evaluator, held_out = None, inputs.held_out
    if held_out is not None:
        evaluator = Evaluator(
            held_out, collator_of(inputs, held_out.samples), options.batch_size, options.profile != "ddp"
        )
    trainer = SwitchTrainer(
        objective=inputs.objective,
        source=models.source,
        teacher=models.switch_teacher,
        sample_media=inputs.media,
        extra_terms=models.extra_terms,
        vocab_map=inputs.vocabularies,
        group_by=options.group_by or "none",
        cost_model=models.cost_model,
        peak_tflops=options.peak_tflops,
        left_out=inputs.samples.left_out,
        evaluator=evaluator,
        best=best,
        part_rates=options.part_rates(),
        vsd_share=options.vsd_share or 1.0,
        half_copies=options.precision == "bfloat16-copies",
        compiled=COMPILE in options.as_experimental(),
        model=models.student,
        args=arguments,
        train_dataset=inputs.samples,
        data_collator=collator_of(inputs, inputs.samples),
        processing_class=readers_of(student),  # saved with every checkpoint, see SwitchTrainer
    )
    trainer.remove_callback(PrinterCallback)
    assert options.global_batch is not None  # resolved
    trainer.add_callback(
        RunReport(len(inputs.samples), options.global_batch, absent_terms(options.objective, bool(options.switch)))
    )
    trainer.add_callback(stopping)
    if held_out is not None:
        trainer.add_callback(EvaluationSchedule(held_out.every, trainer))
    return trainer


def collator_of(inputs: TrainingInputs, samples: OrderedSamples) -> Collator:
    """Return the collator of the samples that train, or of held-out ones."""
    options, pad_id = inputs.options, pad_id_of(inputs.student.tokenizer)
    two_views = samples.teacher_encoder is not None
    several = samples is inputs.samples and len(inputs.teachers) > 1 and inputs.payload == "hidden"
    return Collator(
        pad_id,
        None if options.profile == "ddp" else placeholder_sample(samples.encoder, samples.teacher_encoder),
        samples.payload if samples.stores else None,
        pad_id_of((inputs.teacher or inputs.student).tokenizer),
        options.packing,
        empty_sample(pad_id, two_views, options.vocab_map and two_views),
        samples.teacher_of if several else None,
    )


def _finish(inputs: TrainingInputs, trainer: SwitchTrainer) -> TrainSummary:
    options, samples = inputs.options, inputs.samples
    trainer.save_model()
    history = trainer.state.log_history
    last: dict[str, Any] = next((entry for entry in reversed(history) if "loss_ce" in entry), {})
    left_out = Counter() if samples.left_out is None else samples.left_out.counts()
    used = len(samples) - left_out.total()
    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "samples": used,
        "skipped": dict(samples.skipped + left_out),
        "losses": {name: value for name, value in last.items() if name.startswith("loss")},
        "history": history,
        "made_from": _made_from(inputs),
    }
    if (kept := read_best(options.output)) is not None:
        summary["best"] = {name: kept[name] for name in ("metric", "value", "step")}
    if trainer.is_world_process_zero():
        plot_run(history, options.output, title_of(options, inputs.payload if inputs.stores else None, inputs.mixture))
        # The summary says that the run is finished, so the student must be on the disk before it.
        for path in options.output.iterdir():
            if path.is_file():
                sync(path)
        write_atomically(options.output / SUMMARY, json.dumps(summary, indent=1), durable=True)
    return TrainSummary(options.output, summary["steps"], used, summary["skipped"], summary["losses"], False)


def _made_from(inputs: TrainingInputs) -> dict[str, Any]:
    """Return what a student is made from, for the records beside the last and the best one."""
    identities = [store.manifest.identity for store in inputs.stores]
    taught = [kind for kind, _ in groupby(store.manifest.teacher for store in inputs.stores)]
    return {
        "template": inputs.samples.template,
        "data": inputs.samples.fingerprint,
        "teacher_signal": inputs.teacher_signal,
        "store": ", ".join(identities) or None,
        "teacher": None if len(taught) != 1 else taught[0],
        **inputs.mixture_record,
    }
