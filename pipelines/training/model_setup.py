"""The models of a training run: the student, and as much of the teacher as the run needs."""

import torch
from transformers import LlavaForConditionalGeneration

from switchkd.errors import CheckpointError
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.switch_adapter import SwitchAdapter
from switchkd.models.vlm import enable_activation_checkpointing, freeze, load_lm_head, load_model
from switchkd.pipelines.stored_teacher import StoredHidden, StoredTopK, TeacherSource
from switchkd.pipelines.training.int8_teacher import NAME as INT8
from switchkd.pipelines.training.int8_teacher import to_int8
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.teacher_source import LiveTeacher
from switchkd.stores import TeacherStore


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
            enable_activation_checkpointing(whole.model.language_model)
        return LiveTeacher(whole, teacher.vocab_rows), whole if objective.switch else None
    switch = None
    if objective.switch:
        assert teacher is not None
        switch = load_model(teacher, vision=False, dtype=dtype)
        freeze(switch)
        if options.teacher_dtype == INT8:
            to_int8(switch.model.language_model)
        if options.teacher_checkpointing:
            enable_activation_checkpointing(switch.model.language_model)
    if payload == "topk":
        return StoredTopK(store.manifest.vocab_rows, options.tail), switch
    assert teacher is not None
    head = load_lm_head(teacher, dtype) if switch is None else switch.lm_head.weight
    return StoredHidden(head, store.manifest.vocab_rows), switch


def make_switch_adapter(options: TrainOptions, teacher: Checkpoint, student: Checkpoint) -> SwitchAdapter:
    """Make the adapter that `options` ask for. Raises CheckpointError if features cannot be brought to the teacher's number."""
    torch.manual_seed(options.seed)
    shapes = [(side.feature_tokens, side.feature_width) for side in (student, teacher)]
    try:
        return SwitchAdapter(str(options.switch_adapter), *shapes)
    except ValueError as error:
        raise CheckpointError(f"--switch-adapter from {student.path} to {teacher.path}: {error}") from None
