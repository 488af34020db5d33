"""What a training run logs: its plan before the first step, a line per logging interval, and the memory used at the end."""

import logging
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from switchkd.counting import counted
from switchkd.models.block_attention import uses_block_attention
from switchkd.models.components import language_model_of
from switchkd.models.lora import lora_layers
from switchkd.pipelines.preflight.skip_limit import allowed_skips
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import RECORD, to_plain
from switchkd.pipelines.training.cost_model import CostModel, count_parameters
from switchkd.pipelines.training.inputs import TrainingInputs
from switchkd.settings import MAX_SKIPPED

SHARDED = {"ddp": None, "fsdp": "all", "zero3": "student"}  # which of the models each profile shards
STEP_LINE_SECONDS = 30.0  # without a logging interval's line, the steps and the time left are told
log = logging.getLogger(__name__)


def tell_plan(
    inputs: TrainingInputs,
    steps: int,
    processes: int,
    cost_model: CostModel,
    unused: list[str],
    resume: Path | None,
) -> None:
    """Log the teacher's signal, the options, the models' parts and trainable parameters, the data, and the estimated memory.

    Args:
        steps, processes: of the run. unused: vision tensors that no gradient reaches. resume: the checkpoint that it resumes from.
    """
    options = inputs.options
    _tell_signal(inputs)
    said = ", ".join(f"{name} {value}" for name, value in to_plain(options).items() if value not in (None, {}))
    log.info(
        "options (in %s): %s",
        options.output / RECORD,
        textwrap.fill(said, 130, initial_indent="\n  ", subsequent_indent="  "),
    )
    _tell_models(inputs, cost_model, unused)
    _tell_data(inputs)
    log.info(
        "steps: %s of %s: %s (%s) x batch size %d x accumulation %d",
        f"{steps:,}", counted(options.global_batch or 0, "sample"), counted(processes, "process"), options.profile,
        options.batch_size, options.accumulation,
    )  # fmt: skip
    rows, width, memory = estimate_memory(inputs, processes, cost_model)
    log.info(
        "memory, estimated for one process and a batch of the longest samples (%d x %d tokens): %s (%s)",
        rows, width, _gigabytes(sum(memory.values())),
        ", ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items() if size),
    )  # fmt: skip
    if resume is not None:
        log.info("resuming from %s", resume)


def _tell_signal(inputs: TrainingInputs) -> None:
    options, samples = inputs.options, inputs.samples
    log.info("objective: %s%s", options.objective, " with the switch pathway" if options.switch else "")
    if (count := samples.skipped.total()) > allowed_skips(samples.rows, MAX_SKIPPED):
        log.warning(
            "warning: %s of %s samples (%.1f %%) do not train, since they could not be used. `switchkd data check` says why; "
            "`switchkd cache-teacher --retry-skipped` adds those whose images can now be read to the store",
            f"{count:,}", f"{samples.rows:,}", 100 * count / samples.rows,
        )  # fmt: skip
    for line in samples.warnings():
        log.warning("warning: %s", line)
    if inputs.teacher_signal is not None:
        log.info("teacher's signal: %s", inputs.teacher_signal)
    if inputs.caution is not None:
        log.warning("%s; train from hidden states", inputs.caution)


def _tell_models(inputs: TrainingInputs, cost_model: CostModel, unused: list[str]) -> None:
    for who, model in (("student", cost_model.student), ("teacher", cost_model.switch or cost_model.live)):
        if model is not None:
            parts = count_parameters(model)
            told = ", ".join(f"{part} {trained:,} of {every:,}" for part, (every, trained) in parts.items())
            every, trained = (sum(counts) for counts in zip(*parts.values(), strict=True))
            log.info(
                "%s: %s of %s parameters train (%s), %s", who, f"{trained:,}", f"{every:,}", told, str(model.dtype)[6:]
            )
    if (lora := inputs.options.as_lora(inputs.parts)) is not None:
        log.info(
            "LoRA: rank %d, alpha %g, dropout %g, beside %s of %s, whose own weights are frozen",
            lora.rank, lora.alpha, lora.dropout, counted(len(lora_layers(cost_model.student)), "linear layer"),
            " and ".join(sorted(lora.parts)),
        )  # fmt: skip
    if unused:
        log.info(
            "frozen, since no gradient reaches them: %s, the first is %s",
            counted(len(unused), "vision tensor"),
            unused[0],
        )


def _tell_data(inputs: TrainingInputs) -> None:
    options, samples = inputs.options, inputs.samples
    what = "usable" if inputs.mixture is None else "an epoch"
    log.info("samples: %s %s, skipped: %s", f"{len(samples):,}", what, dict(samples.skipped) or "none")
    for name, about in (inputs.mixture or {}).items():
        share = f", {about['share']}" if "share" in about else ""
        log.info(
            "  %s: %s an epoch, of %s usable (%s%s), template %s",
            name, f"{about['samples_per_epoch']:,}", f"{about['usable']:,}", counted(about["rows"], "row"), share,
            about.get("template"),
        )  # fmt: skip
    if not samples.surveyed:
        log.info(
            "  as far as is known before images are read: a sample that cannot be used is left out of its step and counted, up to "
            "--max-skipped %g", options.max_skipped,
        )  # fmt: skip
    for store in inputs.stores:
        log.info("store: %s", store.path)
    if (held_out := inputs.held_out) is not None:
        log.info(
            "held-out samples: %s of %s, evaluated every %s by CE%s, and exact match of %s",
            f"{len(held_out.chosen):,}", f"{len(held_out.samples):,}", counted(held_out.every, "step"),
            "" if not held_out.with_teacher else ", Align, VSD" if options.switch else ", Align",
            counted(len(held_out.questions), "answer"),
        )  # fmt: skip


def estimate_memory(inputs: TrainingInputs, processes: int, cost_model: CostModel) -> tuple[int, int, dict[str, float]]:
    """Return the rows and width of a batch of the longest samples, and what it takes of one process, in bytes by kind."""
    options, length = inputs.options, inputs.samples.longest()
    rows = 1 if options.packing is None else max(1, options.packing // length)  # samples per row
    rows, width = -(-options.batch_size // rows), rows * length
    memory = cost_model.memory(
        rows,
        width,
        processes=processes,
        sharded=SHARDED[options.profile],
        half=options.in_bfloat16,
        student_checkpointed=options.student_checkpointing,
        teacher_checkpointed=options.teacher_checkpointing,
        masked=options.packing is not None and not uses_block_attention(language_model_of(cost_model.student)),
    )
    if options.precision == "bfloat16-copies":
        memory["copies"] = 2.0 * sum(p.numel() for p in cost_model.student.parameters())
    return rows, width, memory


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


class RunReport(TrainerCallback):
    """Logs one line per logging interval, and at the end the peak memory, if the device counts it.

    Args:
        samples: of an epoch. absent: losses that the lines leave out, see `settings.absent_terms`.
    """

    def __init__(self, samples: int, samples_per_step: int, absent: Collection[str] = ()) -> None:
        self.samples, self.samples_per_step, self.absent = samples, samples_per_step, absent

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = Progress("training", state.max_steps, "steps", done=state.global_step, every=STEP_LINE_SECONDS)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch = state.global_step * self.samples_per_step / self.samples  # for the Trainer, the run is one epoch
        if state.is_world_process_zero:
            self.progress.advance(state.global_step - self.progress.done)
        if state.global_step == state.max_steps:
            control.should_log = (
                True  # also the losses of a run, or of its end, that is shorter than the logging interval
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss_ce" in logs and state.is_world_process_zero:
            self.progress.advance(
                0,
                int(logs["positions"]),
                line_of({name: value for name, value in logs.items() if name not in self.absent}),
            )
        elif logs and "eval_loss_ce" in logs and state.is_world_process_zero:
            log.info("held-out samples after step %s: %s", f"{state.global_step:,}", line_of_held_out(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            log.info("memory, the most that was used: %s", _gigabytes(torch.cuda.max_memory_allocated()))


class EvaluationSchedule(TrainerCallback):
    """Lets a trainer evaluate its student every `every` steps, and after the last one.

    Where a signal ends the run, its checkpoint must be written in the time that is left, so the evaluation follows when the run is
    resumed. Add it after `Stopping`, which knows of signals.
    """

    def __init__(self, every: int, trainer: Any) -> None:
        self.every, self.trainer = every, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        evaluated = any(entry["step"] == step and "eval_loss_ce" in entry for entry in state.log_history)
        if step and step % self.every == 0 and not evaluated:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step == state.max_steps
        if last or (state.global_step % self.every == 0 and not control.should_training_stop):
            control.should_evaluate = True


def line_of_held_out(logs: dict[str, Any]) -> str:
    """Return the metrics of held-out samples as a line; docs/training.md explains each."""
    said = [
        f"{name.rpartition('_')[2]} {logs[name]:.4f}"
        for name in ("eval_loss", "eval_loss_ce", "eval_loss_align", "eval_loss_vsd")
        if name in logs
    ]
    if "eval_exact_match" in logs:
        said.append(f"exact match {logs['eval_exact_match']:.3f} of {counted(round(logs['eval_answers']), 'answer')}")
    if "eval_visual_advantage" in logs:
        error, samples = logs["eval_visual_advantage_error"], logs["eval_visual_advantage_samples"]
        said.append(
            f"visual advantage {logs['eval_visual_advantage']:+.3f} ± {error:.3f} nats of {counted(round(samples), 'sample')}"
        )
    return ", ".join([*said, f"{logs['eval_seconds']:.1f} s"])


def line_of(logs: dict[str, Any]) -> str:
    """Return the metrics of one logging interval as a line; docs/training.md explains each."""
    losses = " ".join(f"{n.removeprefix('loss_')} {v:.4f}" for n, v in logs.items() if n.startswith("loss_"))
    said = [f"loss {logs['loss']:.4f} ({losses})", f"lr {logs['learning_rate']:.2e}"]
    if "grad_norm" in logs:
        said.append(f"gradient {logs['grad_norm']:.3g}")
    if "vsd_gradient_norm" in logs:
        term = "the switch pathway's CE" if "loss_switch_ce" in logs else "VSD"
        said.append(f"of {term} {logs['vsd_gradient_norm']:.3g}")
    if "knee_teacher_mean" in logs:
        said += [
            f"k {who} {logs[f'knee_{who}_mean']:,.0f} p95 {logs[f'knee_{who}_p95']:,.0f}"
            for who in ("teacher", "student")
        ]
    said += [
        f"{logs['samples_per_second']:,.1f} samples/s",
        f"waiting {logs['wait_share']:.0%}",
        f"padding {logs['padding_share']:.0%}",
    ]
    if "left_out" in logs:
        said.append(f"left out {counted(logs['left_out'], 'sample')}")
    if "compiled_graphs" in logs:
        said.append(
            f"compiled {counted(logs['compiled_graphs'], 'graph')}, {counted(logs['not_compiled'], 'frame')} not"
        )
    if "tflops_per_second" in logs:
        said.append(f"{logs['tflops_per_second']:.3g} TFLOP/s")
    if "mfu" in logs:
        said.append(f"MFU {logs['mfu']:.1%}")
    return ", ".join(said)
