"""Loading of the models of a training run: the student, and as much of the teacher as the run needs."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.components import language_model_of, tower_of
from switchkd.models.families import family_of, logit_map_of
from switchkd.models.fit import probe_cuts
from switchkd.models.lora import attach_lora, hold_frozen_in_bfloat16
from switchkd.models.packing_probe import enable_packing_in
from switchkd.models.switch_adapter import CutAdapters, SwitchAdapter
from switchkd.models.vlm import (
    enable_activation_checkpointing,
    freeze,
    freeze_unused_vision,
    load_lm_head,
    load_model,
)
from switchkd.models.weightless import build_weightless, expect_frozen_in_bfloat16, expect_packing
from switchkd.pipelines.stored_teacher import StoredHidden, StoredOfSeveral, StoredTopK, TeacherSource
from switchkd.pipelines.training.cost_model import CostModel, patches_of
from switchkd.pipelines.training.inputs import TrainingInputs
from switchkd.pipelines.training.int8_teacher import NAME as INT8
from switchkd.pipelines.training.int8_teacher import count_as_int8, to_int8
from switchkd.pipelines.training.live.baseline_terms import make_extra_terms
from switchkd.pipelines.training.live.extra_terms import ExtraTerms
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.option_groups.step import COMPILE, FP8_TEACHER, VARLEN
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.parallelism import fit_fsdp, loading_whole, shard_frozen
from switchkd.pipelines.training.step_ways.experimental import compile_layers
from switchkd.pipelines.training.step_ways.fp8_teacher import count_as_fp8, to_fp8
from switchkd.pipelines.training.student_parts import freeze_other_parts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingModels:
    """The models of a run on the CPU, frozen, checkpointed and, for the frozen ones, sharded as the options request."""

    student: Any  # float32; of the class that transformers has for its checkpoint
    source: TeacherSource | None  # of the teacher's signals; None for an objective that reads none
    switch_teacher: Any | None  # of the switch pathway; may be the live teacher
    extra_terms: ExtraTerms | None  # of a baseline's objective
    cost_model: CostModel
    unused: list[str]  # number of vision-tower parameters that were frozen, since no gradient reaches them


def set_up_models(inputs: TrainingInputs, arguments: TrainingArguments, weights: bool = True) -> TrainingModels:
    """Load the student and what the run needs of the teacher, and prepare them for training.

    Args:
        inputs: see `inputs.open_inputs`. arguments: determine whether the models are sharded.
        weights: whether they are loaded; without, the models serve a plan alone, see `switchkd.models.weightless`.

    Raises:
        CheckpointError: weights that are missing or do not fit, or features that an adapter cannot map.
        ConfigError: a model cannot be packed or quantised as requested.
    """
    options, teacher = inputs.options, inputs.teacher
    if inputs.objective.switch and (note := family_of(inputs.student.config).switch_note):
        log.warning("the switch pathway of a %s: %s; --no-switch turns it off", inputs.student.config.model_type, note)
    with loading_whole(arguments):
        student = (load_model if weights else build_weightless)(inputs.student, dtype="float32")
        source, switch_teacher = _load_teacher(inputs, weights)
    live = source.teacher if isinstance(source, LiveTeacher) else None
    chosen = options.as_experimental()
    if options.packing is not None:
        _enable_packing(student, str(options.student), inputs.media, weights, VARLEN in chosen)
        if (packed := switch_teacher or live) is not None:
            _enable_packing(packed, str(options.teacher), inputs.teacher_media, weights, VARLEN in chosen)
    freeze_other_parts(student, inputs.parts)
    if (lora := options.as_lora(inputs.parts)) is not None:
        attach_lora(student, lora, options.seed)
    unused = freeze_unused_vision(student, inputs.media) if "vision" in inputs.parts else []
    if lora is not None and options.precision == "bfloat16" and options.profile == "ddp":
        if weights:
            hold_frozen_in_bfloat16(student)  # FSDP keeps one dtype
        elif inputs.student.resolve_dtype("auto") == "bfloat16":
            expect_frozen_in_bfloat16(student)
    if options.student_checkpointing:
        enable_activation_checkpointing(tower_of(student), language_model_of(student), dropout=True)
    if FP8_TEACHER in chosen and (whole := switch_teacher or live) is not None:
        (to_fp8 if weights else count_as_fp8)(language_model_of(whole), with_gradient=inputs.objective.switch)
    if COMPILE in chosen:
        compile_layers(*(model for model in (student, switch_teacher or live) if model is not None))
    if options.switch_adapter is not None:
        assert teacher is not None
        student.switch_adapter = make_switch_adapter(
            options, teacher, inputs.student, inputs.media, inputs.teacher_media
        )
    extra_terms = None
    if inputs.objective.baseline:
        assert isinstance(source, LiveTeacher)
        extra_terms = make_extra_terms(inputs.objective.name, student, source, options.seed, options.attention_layer)
        source = extra_terms.source
    if arguments.fsdp:
        fit_fsdp(arguments, student)
        for each in {source.teacher} if isinstance(source, LiveTeacher) else {switch_teacher} - {None}:
            shard_frozen(each)
    stored = source.sources if isinstance(source, StoredOfSeveral) else [source]
    stored_head = sum(each.head.numel() for each in stored if isinstance(each, StoredHidden))
    vision_tokens = inputs.student.feature_tokens
    if inputs.media is not None:
        vision_tokens = int(patches_of(student.config, inputs.media)[0])
    cost_model = CostModel(student, switch_teacher, live, stored_head, vision_tokens)
    return TrainingModels(student, source, switch_teacher, extra_terms, cost_model, unused)


def _enable_packing(model: Any, name: str, media: Mapping[str, Tensor] | None, weights: bool, varlen: bool) -> None:
    if weights:
        enable_packing_in(model, name, media, varlen)
    else:
        expect_packing(model, name)


def _teacher_dtype(options: TrainOptions, teacher: Checkpoint) -> str:
    """Return the dtype of the frozen weights, except int8 layers; bits beyond autocast's dtype would never be used."""
    asked = "auto" if options.teacher_dtype == INT8 else options.teacher_dtype
    if asked == "auto" and options.in_bfloat16:
        return "bfloat16"
    return teacher.resolve_dtype(asked)


def _load_teacher(inputs: TrainingInputs, weights: bool) -> tuple[TeacherSource | None, Any | None]:
    """Load only what the run needs of the teacher: (source of its signals, model of the switch pathway).

    Without weights there may be no store yet, although one will be read: then its teacher is the run's.
    """
    options, teacher, stores = inputs.options, inputs.teacher, inputs.stores
    load = load_model if weights else build_weightless
    if not inputs.objective.needs_teacher:
        return None, None
    dtype = "" if teacher is None else _teacher_dtype(options, teacher)
    if inputs.objective.needs_signal and options.teacher_mode == "live":
        assert teacher is not None
        whole = load(teacher, dtype=dtype)
        freeze(whole)
        if options.teacher_checkpointing:
            enable_activation_checkpointing(language_model_of(whole))
        return LiveTeacher(whole, teacher.vocab_rows), whole if inputs.objective.switch else None
    switch = None
    if inputs.objective.switch:
        assert teacher is not None
        switch = load(teacher, vision=False, dtype=dtype)
        freeze(switch)
        if options.teacher_dtype == INT8:
            (to_int8 if weights else count_as_int8)(language_model_of(switch))
        if options.teacher_checkpointing:
            enable_activation_checkpointing(language_model_of(switch))
    if not inputs.objective.needs_signal:
        return None, switch
    if stores:
        rows = stores[0].manifest.vocab_rows
    else:
        assert teacher is not None
        rows = teacher.vocab_rows
    if (inputs.payload or options.payload) == "topk":
        return StoredTopK(rows, options.tail), switch
    exact_knee = all(store.manifest.has_exact_knee for store in stores)
    sources = []
    for each in inputs.teachers:  # with the switch pathway there is one
        if switch is not None:
            head = switch.lm_head.weight
        elif weights:
            head = load_lm_head(each, _teacher_dtype(options, each))
        else:
            head = build_weightless(each, vision=False, dtype=_teacher_dtype(options, each)).lm_head.weight
        sources.append(StoredHidden(head, rows, exact_knee, logit_map_of(each.config, each.path)))
    return sources[0] if len(sources) == 1 else StoredOfSeveral(sources), switch


def make_switch_adapter(
    options: TrainOptions,
    teacher: Checkpoint,
    student: Checkpoint,
    media: Mapping[str, Tensor] | None = None,
    teacher_media: Mapping[str, Tensor] | None = None,
) -> SwitchAdapter | CutAdapters:
    """Create the requested switch adapter. Raises CheckpointError if it cannot map features to the teacher's number of them."""
    torch.manual_seed(options.seed)
    if media is not None and teacher_media is not None:  # not Llavas
        sides = (student.config, media), (teacher.config, teacher_media)
        return CutAdapters(str(options.switch_adapter), *(probe_cuts(*side).widths for side in sides))
    shapes = [(side.feature_tokens, side.feature_width) for side in (student, teacher)]
    try:
        return SwitchAdapter(str(options.switch_adapter), *shapes)
    except ValueError as error:
        raise CheckpointError(f"--switch-adapter from {student.path} to {teacher.path}: {error}") from None
