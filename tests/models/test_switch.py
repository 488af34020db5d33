"""The switch pathway: whose parameters the gradient of VSD and Align reaches, and what z_switch is."""

import pytest
import tiny
import torch

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.features import capture_features
from switchkd.models.switch import switch_states
from switchkd.models.vlm import freeze, freeze_unused_vision, load_model
from switchkd.positions import predicting_rows, targets

TEXT_ONLY = 1  # the row without an image


@pytest.fixture(scope="module")
def batch(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data = tiny.data(folder, tiny.rows(4, text_only=(TEXT_ONLY,), two_turns=(2,)))
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], folder / "images", 128)
    return collate([encoder.encode(sample) for sample in SampleFile(data)], pad_id=0)


def teacher_logits(whole, batch):
    with torch.no_grad():
        return whole(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
        ).logits[predicting_rows(batch["labels"])]


def parts_of(batch, teacher, student_model, objective):
    """What a training step computes, from its pieces; the teacher's vision tower is not loaded for the switch pass."""
    opened = open_checkpoint(teacher)
    blind = freeze(load_model(opened, vision=False))
    rows = predicting_rows(batch["labels"])
    with capture_features(student_model) as features:
        logits = student_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            logits_to_keep=rows,
        ).logits
    on = batch["has_image"]
    switch = blind.lm_head(
        switch_states(blind, features, batch["input_ids"][on], batch["attention_mask"][on], rows[on])
    )
    signal = DenseSignal(teacher_logits(load_model(opened), batch))
    parts = objective.terms(logits, targets(batch["labels"]), signal, switch, on.repeat_interleave(rows.sum(-1)))
    return parts, blind


def reached(model, prefix=""):
    return {
        name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0 and prefix in name
    }


def trainable(model, prefix):
    return {name for name, p in model.named_parameters() if p.requires_grad and prefix in name}


@pytest.fixture
def student_model(student):
    model = load_model(open_checkpoint(student), dtype="float32")
    freeze_unused_vision(model)
    return model


# A softmax over attention scores ignores what a key bias adds to all of them: its gradient is 0 in exact arithmetic.
def without_key_bias(names):
    return {name for name in names if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", ("dbild-rkl", "switch-ce"))
def test_the_switch_term_reaches_every_student_vit_parameter_and_nothing_else(batch, teacher, student_model, name):
    parts, blind = parts_of(batch, teacher, student_model, Objective(name))
    parts.vsd.backward()
    vit = without_key_bias(trainable(student_model, "vision_tower"))
    assert vit
    assert without_key_bias(reached(student_model, "vision_tower")) == vit
    assert not [name for name in reached(student_model) if "vision_tower" not in name]
    assert not reached(blind)


def test_align_reaches_all_three_student_parts(batch, teacher, student_model):
    parts, blind = parts_of(batch, teacher, student_model, Objective())
    parts.align.backward()
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert without_key_bias(reached(student_model, part)) == without_key_bias(trainable(student_model, part)), part
    assert not reached(blind)


def test_vsd_is_zero_with_the_teachers_own_eyes(batch, teacher, student_model):
    whole = load_model(open_checkpoint(teacher))
    student_model.model.vision_tower.load_state_dict(whole.model.vision_tower.state_dict())
    parts, _ = parts_of(batch, teacher, student_model, Objective())
    assert parts.vsd.abs() < 1e-5
    assert parts.align > 1e-3


def test_vsd_is_not_zero_with_other_eyes(batch, teacher, student_model):
    parts, _ = parts_of(batch, teacher, student_model, Objective())
    assert parts.vsd > 1e-3


def test_a_text_only_sample_counts_in_ce_and_align_and_not_in_vsd(batch, teacher, student_model):
    parts, _ = parts_of(batch, teacher, student_model, Objective())
    keep = batch["has_image"]
    images = {name: batch[name][keep] for name in ("input_ids", "attention_mask", "labels", "has_image")}
    images["pixel_values"] = batch["pixel_values"]
    without, _ = parts_of(images, teacher, student_model, Objective())
    torch.testing.assert_close(parts.vsd, without.vsd)
    assert parts.ce - without.ce > 0.1
    assert parts.align - without.align > 1e-4


def test_z_switch_is_the_teacher_run_on_the_students_features(batch, teacher, student_model):
    """Against the teacher's own forward with its vision tower replaced by the student's."""
    opened = open_checkpoint(teacher)
    hybrid = load_model(opened)
    hybrid.model.vision_tower = student_model.model.vision_tower
    rows, on = predicting_rows(batch["labels"]), batch["has_image"]
    expected = teacher_logits(hybrid, batch)[on.repeat_interleave(rows.sum(-1))]
    with capture_features(student_model) as features:
        student_model.model.get_image_features(pixel_values=batch["pixel_values"])
    blind = load_model(opened, vision=False)
    found = blind.lm_head(switch_states(blind, features, batch["input_ids"][on], batch["attention_mask"][on], rows[on]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_image_tokens_is_checked(batch, teacher):
    blind = load_model(open_checkpoint(teacher), vision=False)
    rows = predicting_rows(batch["labels"])
    with pytest.raises(ValueError, match=r"12 image tokens for projected features of \(1, 4, 32\)"):
        switch_states(blind, torch.zeros(1, 4, 32), batch["input_ids"], batch["attention_mask"], rows)


def test_under_autocast(batch, teacher):
    """`--precision bfloat16` over a float32 teacher."""
    blind = freeze(load_model(open_checkpoint(teacher), vision=False))
    rows, on = predicting_rows(batch["labels"]), batch["has_image"]
    inputs = batch["input_ids"][on], batch["attention_mask"][on], rows[on]
    features = torch.randn(3, 4, 32, requires_grad=True)
    expected = switch_states(blind, features, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = switch_states(blind, features, *inputs)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert torch.autograd.grad(found.float().sum(), features)[0].abs().sum() > 0
