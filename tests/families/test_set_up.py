"""The models of a run in every family, as the options request them; their cost, against torch's own count."""

import json
from dataclasses import replace

import families as tiny
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from switchkd.errors import CheckpointError, ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.families import family_of
from switchkd.models.features import media_of
from switchkd.models.switch_adapter import CutAdapters
from switchkd.pipelines.training.cost_model import Work, count_parameters, patches_of
from switchkd.pipelines.training.inputs import TrainingInputs, check_models, resolve_options
from switchkd.pipelines.training.model_setup import set_up_models
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.resuming import as_begun
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows
from switchkd.settings import BASELINE_OBJECTIVES

STUDENTS = [family for family in tiny.FAMILIES if not family_of(tiny.config(family)).teaches_only]


def inputs_of(family, folder, vision=None, **more):
    """A run with a live teacher; `more` are options."""
    teacher = tiny.write_checkpoint(family, folder / "teacher", 1)
    student = tiny.write_checkpoint(family, folder / "student", 2, vision=vision)
    options = TrainOptions(
        student=student,
        teacher=teacher,
        data=folder / "data.json",
        output=folder / "run",
        steps=2,
        batch_size=2,
        teacher_mode="live",
        **more,
    )
    media = None if family == "llava" else tiny.one_image(family, tiny.media(family))
    return TrainingInputs(
        options=options,
        objective=options.as_objective(),
        parts=options.as_parts(),
        student=open_checkpoint(student),
        teacher=open_checkpoint(teacher),
        teachers=(),
        stores=(),
        payload=None,
        samples=None,  # not read
        vocabularies=None,
        two_views=False,
        media=media,
        teacher_media=media,
    )


def arguments(folder):
    return TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none", remove_unused_columns=False)


@pytest.mark.parametrize("family", STUDENTS)
def test_the_flops_of_a_step_are_those_that_torch_counts(family, tmp_path):
    inputs, args = inputs_of(family, tmp_path), arguments(tmp_path)
    models = set_up_models(inputs, args)
    student, teacher = models.student, models.switch_teacher
    columns = tiny.batch(family, student)
    trainer = SwitchTrainer(
        objective=inputs.objective,
        source=models.source,
        teacher=teacher,
        model=student,
        args=args,
        sample_media=inputs.media,
        cost_model=models.cost_model,
    )
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # torch does not count its CPU kernel of fused attention
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(student, columns | {"has_image": torch.ones(2, dtype=torch.bool)}).backward()
    rows, length = columns["input_ids"].shape
    positions = int(predicting_rows(columns["labels"]).sum())
    vision = (
        ()
        if family == "llava"
        else (*map(int, patches_of(student.config, media_of(columns))), placeholders(student, columns))
    )
    in_text = (rows * length, rows * length**2, 2, rows * length, rows * length**2, positions, positions)
    if family != "qwen3_5":  # linear attention
        counted = counter.get_total_flops()
        assert models.cost_model.flops(Work(*in_text, *vision)) == pytest.approx(counted, rel=0.11)
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    parts = count_parameters(student)
    assert {"vision", "projector", "language"} == set(parts)
    assert sum(every for every, _ in parts.values()) == sum(p.numel() for p in student.parameters())


def placeholders(model, columns):
    return int((columns["input_ids"] == model.config.image_token_id).sum())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_packing_adapters_and_checkpointing_together(family, tmp_path):
    wide = {"hidden_size": 48} | ({"depth": 3, "deepstack_visual_indexes": [0, 1]} if family == "qwen3_vl" else {})
    inputs = inputs_of(
        family,
        tmp_path,
        wide,
        packing=128,
        switch_adapter="linear",
        student_checkpointing=True,
        teacher_checkpointing=True,
    )
    models = set_up_models(inputs, arguments(tmp_path))
    assert isinstance(models.student.switch_adapter, CutAdapters)
    assert not tiny.is_hollow(models.switch_teacher)  # it is the live teacher


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_packing_is_refused_where_samples_would_mix(family, tmp_path):
    with pytest.raises(ConfigError, match=r"--packing: .*; leave --packing out"):
        set_up_models(inputs_of(family, tmp_path, packing=128), arguments(tmp_path))


@pytest.mark.parametrize("objective", BASELINE_OBJECTIVES)
def test_the_baselines_are_for_llava(objective, tmp_path):
    inputs = inputs_of("internvl", tmp_path, objective=objective, switch=False)
    with pytest.raises(
        CheckpointError, match=f"objective {objective} compares visual tokens and attention of two Llavas"
    ):
        check_models(inputs.options, inputs.student, inputs.teacher)


def test_a_mixture_of_experts_is_no_student(tmp_path):
    inputs = inputs_of("qwen3_vl_moe", tmp_path)
    with pytest.raises(CheckpointError, match="student is a qwen3_vl_moe, which only teaches here"):
        check_models(inputs.options, inputs.student, inputs.teacher)


@pytest.mark.parametrize("family", ["gemma3", "smolvlm"])
def test_what_speaks_against_vsd_is_told(family, tmp_path, caplog):
    inputs = inputs_of(family, tmp_path)
    set_up_models(inputs, arguments(tmp_path))
    assert f"the switch pathway of a {family}:" in caplog.text and "--no-switch" in caplog.text
    caplog.clear()
    without = inputs.options.__class__(**(vars(inputs.options) | {"switch": False}))
    set_up_models(replace(inputs, options=without, objective=without.as_objective()), arguments(tmp_path))
    assert "the switch pathway" not in caplog.text


def with_config(folder, family):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


@pytest.mark.parametrize(
    ("family", "on"), [("gemma3", False), ("smolvlm", False), ("qwen3_vl", True), ("llava", True), ("unheard-of", True)]
)
def test_the_switch_pathway_is_off_by_default_where_it_teaches_nothing(family, on, tmp_path, caplog):
    student = with_config(tmp_path / "student", family)
    options = TrainOptions(student=student, data=tmp_path, output=tmp_path / "run")
    assert resolve_options(options).switch == on
    said = f"the switch pathway is off: {student} is a {family}, and"
    assert (said in caplog.text and "--switch turns it on" in caplog.text) == (not on)
    for given in (True, False):
        assert resolve_options(replace(options, switch=given)).switch == given
    assert resolve_options(replace(options, switch_adapter="linear")).switch


def test_a_begun_run_keeps_its_switch_pathway(tmp_path):
    student = with_config(tmp_path / "student", "gemma3")
    options = TrainOptions(student=student, data=tmp_path, output=tmp_path / "run")
    (options.output / "checkpoint-1").mkdir(parents=True)
    for before in (True, False):
        (options.output / "run.yaml").write_text(f"switch: {str(before).lower()}\n")
        assert as_begun(options).switch == before
