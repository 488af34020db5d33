"""Objective switch-ce: CE, and CE of the true answers through the teacher's projector and LLM, against loops over positions."""

import json
from dataclasses import replace

import families
import pytest
import torch
import training
from family_batches import text_of
from transformers import LlavaForConditionalGeneration, TrainingArguments

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError
from switchkd.fingerprints import component_of
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.components import lm_head_of
from switchkd.models.features import capture_features, media_of
from switchkd.models.hollow import hollow_out
from switchkd.models.switch import switch_states
from switchkd.models.vlm import freeze, states_at_positions
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows, targets

cached, options = training.cached, training.options


def cross_entropy_by_loop(logits, wanted):
    """Mean over rows of log Σ e^z - z_y, in the logits' dtype."""
    found = [z.exp().sum().log() - z[y] for z, y in zip(logits, wanted.tolist(), strict=True)]
    return sum(found) / len(found)


@pytest.fixture
def control(options):
    """Options of a run with the objective; the data file has a text-only row and one of two turns."""
    return replace(options, objective="switch-ce", cache=None, template="qa")


def test_both_terms_are_what_two_models_compute_by_hand(control, cached):
    """In float64, with the teacher's input embeddings put together here; the text-only row has no second term."""
    train(replace(control, batch_size=12, steps=1, vsd_weight=0.5))
    student, teacher = (
        LlavaForConditionalGeneration.from_pretrained(folder).double() for folder in (control.student, control.teacher)
    )
    opened = open_checkpoint(control.student)
    encoder = SampleEncoder(opened, TEMPLATES["qa"], cached / "images", 128)
    ce, through, images = [], [], 0
    for sample in SampleFile(cached / "data.json"):
        columns = collate([encoder.encode(sample)], 0)
        ids, labels = columns["input_ids"], columns["labels"][0]
        kept, wanted = labels.roll(-1)[:-1] != -100, labels[labels != -100]
        pixels = columns.get("pixel_values")
        with torch.no_grad():
            given = {} if pixels is None else {"pixel_values": pixels.double()}
            logits = student(input_ids=ids, **given).logits[0, :-1][kept]
            ce += [cross_entropy_by_loop(logits[i : i + 1], wanted[i : i + 1]) for i in range(len(wanted))]
            if pixels is None:
                continue
            images += 1
            seen = student.model.vision_tower(pixels.double(), output_hidden_states=True)
            layer = student.config.vision_feature_layer
            tokens = teacher.model.multi_modal_projector(seen.hidden_states[layer])
            embeds = teacher.get_input_embeddings()(ids)
            embeds[0, ids[0] == opened.image_token_id] = tokens[0]
            switched = teacher.lm_head(teacher.model.language_model(inputs_embeds=embeds).last_hidden_state)
            through += [cross_entropy_by_loop(switched[0, :-1][kept], wanted) * len(wanted)]
    assert images == 11
    logged = training.logged(control.output)[0]
    mean, second = float(sum(ce)) / len(ce), float(sum(through)) / len(ce)
    assert logged["loss_ce"] == pytest.approx(mean, rel=1e-5)
    assert logged["loss_switch_ce"] == pytest.approx(second, rel=1e-5)
    assert logged["loss"] == pytest.approx(mean + 0.5 * second, rel=1e-5)
    assert logged["loss_align"] == 0
    assert "loss_vsd" not in logged


@pytest.mark.parametrize("family", ("llava", "qwen2_5_vl", "internvl"))
def test_value_and_gradient_in_every_kind_of_family(family, tmp_path):
    """Against a loop over whole logits; the teacher's tower is gone, and its weights have no gradient."""
    student, teacher = families.build(family, 0), freeze(families.build(family, 1))
    columns = families.batch(family, teacher)
    hollow_out(teacher)
    rows, labels = predicting_rows(columns["labels"]), columns["labels"]
    with capture_features(student) as features:
        own = lm_head_of(student).logits(states_at_positions(student, columns))
    through = switch_states(teacher, features, *text_of(columns), rows, media=media_of(columns), labels=labels)
    first = cross_entropy_by_loop(own, targets(labels))
    second = cross_entropy_by_loop(lm_head_of(teacher).logits(through), targets(labels))
    second.backward(retain_graph=True)
    reached = {component_of(name) for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"vision"}
    first.backward()
    by_hand = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    trainer = SwitchTrainer(
        objective=Objective("switch-ce"),
        source=None,
        teacher=teacher,
        model=student,
        args=TrainingArguments(tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False),
        sample_media=media_of(columns),
    )
    loss = trainer.compute_loss(student, columns | {"has_image": torch.ones(2, dtype=torch.bool)})
    torch.testing.assert_close(loss, first + second, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(dict(student.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("mean", ("position", "sample"))
@pytest.mark.parametrize("images", (0, 1, 4))
def test_terms_at_edge_sizes(mean, images):
    """No image, one image position, all of them; two rows of the vocabulary."""
    objective = Objective("switch-ce", normalize_by=mean)
    labels = torch.tensor([[-100, 0, 1, 1], [-100, 1, -100, -100]])
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    through = torch.randn(images, 2, generator=generator, dtype=torch.float64).requires_grad_()
    on_image = torch.arange(4) < images
    weights = objective.weights(labels)
    found = objective.terms(student, targets(labels), None, through if images else None, on_image, weights)
    weigh = [1.0] * 4 if mean == "position" else [1 / 3] * 3 + [1.0]
    expected = [
        sum(w * cross_entropy_by_loop(z[i : i + 1], targets(labels)[i : i + 1]) for i, w in enumerate(weigh[: len(z)]))
        for z in (student, through)
    ]
    assert found.align is None
    torch.testing.assert_close(found.ce, expected[0])
    assert (found.vsd is None) == (images == 0)
    if found.vsd is not None:
        torch.testing.assert_close(found.vsd, expected[1])
        ours, naive = (torch.autograd.grad(value, through)[0] for value in (found.vsd, expected[1]))
        torch.testing.assert_close(ours, naive)


def test_a_resumed_run_equals_an_undisturbed_one(control, tmp_path, monkeypatch):
    whole = replace(control, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 5)
        with pytest.raises(training.Stop):
            train(control)
    train(control)
    training.assert_same_weights(training.weights(control.output), training.weights(whole.output))


def test_accumulated_and_packed_it_is_the_same(control, tmp_path):
    runs = {
        "whole": {"batch_size": 12},
        "small": {"batch_size": 1, "accumulation": 12},
        "packed": {"packing": 64, "batch_size": 12},
    }
    found = {}
    for name, changed in runs.items():
        train(replace(control, **{"steps": 1, "batch_size": 12, "output": tmp_path / name} | changed))
        found[name] = training.logged(tmp_path / name)[0]
    for key in ("loss", "loss_ce", "loss_switch_ce", "grad_norm"):
        assert found["small"][key] == pytest.approx(found["whole"][key], rel=1e-4), key
        assert found["packed"][key] == pytest.approx(found["whole"][key], rel=1e-4), key


def test_the_teachers_tower_is_not_read_and_no_store_is_opened(control, monkeypatch):
    from switchkd.pipelines.training import model_setup

    load, read = model_setup.load_model, []
    monkeypatch.setattr(
        model_setup, "load_model", lambda *a, **named: read.append(named.get("vision", True)) or load(*a, **named)
    )
    train(replace(control, steps=1))
    assert read == [True, False]  # student, teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"switch": False}, "switch-ce is a cross-entropy on the switch pathway"),
        ({"cache": "stores"}, "switch-ce reads no store: leave --cache out"),
        ({"teacher_mode": "live"}, "switch-ce reads no logits of the teacher"),
        ({"vocab_map": True}, "leave --vocab-map out"),
        ({"temperature": 2.0}, "leave --temperature out"),
        ({"train_parts": "projector"}, "add vision to --train-parts"),
        ({"teacher": None}, "pass --teacher"),
    ],
)
def test_what_does_not_go_with_it_is_refused(control, change, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(control, **change))
    assert not control.output.exists()


def test_held_out_samples_are_measured_by_ce(control):
    """As for the baselines: the objective's own terms need the teacher, and CE and answers tell what a student has learned."""
    train(replace(control, steps=2, eval_data=control.data, eval_images=control.images, keep_best="ce", eval_every=1))
    history = json.loads((control.output / "summary.json").read_text())["history"]
    found = [entry for entry in history if "eval_loss_ce" in entry]
    assert found and all("eval_loss" not in entry and "eval_loss_vsd" not in entry for entry in found)
    with pytest.raises(ConfigError, match="--keep-best vsd is never computed with objective switch-ce"):
        replace(control, eval_data=control.data, keep_best="vsd")
