"""The trainer's loss of a batch, in every family, against whole logits of the models' own forward passes."""

import families as tiny
import pytest
import torch
from family_batches import own_logits, text_of, with_room
from transformers import TrainingArguments

from switchkd.fingerprints import component_of
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal
from switchkd.models.components import language_model_of, lm_head_of, tower_of
from switchkd.models.families import family_of
from switchkd.models.features import capture_features, media_of
from switchkd.models.fit import probe_cuts
from switchkd.models.hollow import hollow_out
from switchkd.models.packing import layout
from switchkd.models.switch import switch_states
from switchkd.models.switch_adapter import CutAdapters, adapt
from switchkd.models.vlm import (
    enable_activation_checkpointing,
    freeze,
    freeze_unused_vision,
    states_at_positions,
)
from switchkd.pipelines.training.cost_model import CostModel, patches_of
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows, targets

PACKING = [family for family in tiny.FAMILIES if family_of(tiny.config(family)).packs]


def trainer_of(student, teacher, columns, output, source=None, **more):
    """A trainer whose switch teacher is hollow."""
    rows = 280
    if source is None:
        source = LiveTeacher(teacher, rows)
    arguments = TrainingArguments(output, use_cpu=True, report_to="none", remove_unused_columns=False)
    return SwitchTrainer(
        objective=Objective(),
        source=source,
        teacher=teacher,
        model=student,
        args=arguments,
        sample_media=media_of(columns),
        **more,
    )


def expected(family, student, teacher, columns):
    """The objective from whole logits; the switch pathway from `test_families`."""
    rows, labels = predicting_rows(columns["labels"]), columns["labels"]
    with capture_features(student) as features:
        states = states_at_positions(student, columns)
    logits = lm_head_of(student).logits(states)
    adapted = adapt(student, features)
    through = switch_states(teacher, adapted, *text_of(columns), rows, media=media_of(columns), labels=labels)
    signal = DenseSignal(own_logits(family, teacher, columns)[:, :280])
    on_image = torch.ones(len(logits), dtype=torch.bool)
    terms = Objective().terms(logits, targets(labels), signal, lm_head_of(teacher).logits(through), on_image)
    return terms.ce + terms.align + terms.vsd


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(params=tiny.FAMILIES)
def pair(request):
    """(family, student, frozen teacher, batch with images)."""
    family = request.param
    student, teacher = tiny.build(family, 0), freeze(tiny.build(family, 1))
    return family, student, teacher, tiny.batch(family, teacher)


def test_the_loss_and_its_gradient_are_those_of_whole_logits(pair, tmp_path):
    family, student, teacher, columns = pair
    wanted = expected(family, student, teacher, columns)
    wanted.backward()
    by_hand = gradients(student)
    trainer = trainer_of(student, teacher, columns, tmp_path)
    batch = columns | {"has_image": torch.ones(2, dtype=torch.bool)}
    loss = trainer.compute_loss(student, batch) * predicting_rows(columns["labels"]).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    found = gradients(student)
    assert found.keys() == by_hand.keys()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", PACKING)
def test_packed_and_checkpointed_it_is_the_same(family, tmp_path):
    student, teacher = tiny.build(family, 0), freeze(tiny.build(family, 1))
    columns = with_room(tiny.batch(family, teacher))
    trainer = trainer_of(student, teacher, columns, tmp_path)
    batch = columns | {"has_image": torch.ones(2, dtype=torch.bool)}
    alone = trainer.compute_loss(student, batch)
    alone.backward()
    by_hand = gradients(student)
    lengths, width = columns["attention_mask"].sum(-1).tolist(), columns["input_ids"].shape[1]
    rows = {"packing": layout([[0, 1]], lengths, width), "switch_packing": layout([[1, 0]], lengths, width)}
    enable_activation_checkpointing(tower_of(student), language_model_of(student))
    enable_activation_checkpointing(language_model_of(teacher))
    packed = trainer.compute_loss(student, batch | rows)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    packed.backward()
    found = gradients(student)
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_text_only_batch_reaches_every_parameter(pair, tmp_path):
    """A gradient of 0 for tower and projector, so that processes with and without images take the same steps."""
    _, student, teacher, columns = pair
    unused = set(freeze_unused_vision(student, media_of(columns)))
    trainer = trainer_of(student, teacher, columns, tmp_path)
    ids = torch.randint(20, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    mask, labels = torch.ones_like(ids), torch.where(torch.arange(9) > 3, ids, -100)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "has_image": torch.zeros(2, dtype=torch.bool),
    }
    trainer.compute_loss(student, batch).backward()
    without = {name for name, p in student.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, (without, unused)
    assert not any(
        p.grad.any() for n, p in student.named_parameters() if component_of(n) == "vision" and p.requires_grad
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl", "gemma3", "smolvlm", "llava_onevision"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_towers_of_another_width_are_joined_cut_by_cut(family, kind, tmp_path):
    wide = {"hidden_size": 48} | ({"depth": 3, "deepstack_visual_indexes": [0, 1]} if family == "qwen3_vl" else {})
    student, teacher = tiny.build(family, 0, vision=wide), freeze(tiny.build(family, 1))
    columns = tiny.batch(family, teacher)
    widths = [probe_cuts(model.config, media_of(columns)).widths for model in (student, teacher)]
    student.switch_adapter = CutAdapters(kind, *widths)
    wanted = expected(family, student, teacher, columns)
    hollow_out(teacher)
    trainer = trainer_of(
        student, teacher, columns, tmp_path, source=_Given(own_logits(family, tiny.build(family, 1), columns))
    )
    batch = columns | {"has_image": torch.ones(2, dtype=torch.bool)}
    loss = trainer.compute_loss(student, batch) * predicting_rows(columns["labels"]).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.switch_adapter.parameters() if p.ndim > 1)


class _Given:
    """A source of the teacher's logits."""

    def __init__(self, logits):
        self.logits = logits[:, :280]

    def signal(self, batch):
        return DenseSignal(self.logits)

    def to(self, device):
        pass


def test_patches_are_those_that_the_tower_sees(pair):
    family, student, _, columns = pair
    seen = []
    layer = next(module for module in tower_of(student).modules() if isinstance(module, torch.nn.ModuleList))[0]
    layer.register_forward_pre_hook(
        lambda _module, inputs, named: seen.append((inputs or tuple(named.values()))[0].shape), with_kwargs=True
    )
    states_at_positions(student, columns)
    patches, pairs = patches_of(student.config, media_of(columns))
    class_tokens = (
        seen[0][0] if tiny.CONFIGS[family][1].get("model_type") in ("clip_vision_model", "internvl_vision") else 0
    )
    assert int(patches) == seen[0][:-1].numel() - class_tokens
    assert 0 < int(pairs) <= int(patches) ** 2
    model = CostModel(student, None, None, 0, int(patches))
    assert model.memory(2, 40, processes=1, sharded=None, half=False)["activations"] > 0


def test_in_bfloat16_it_is_close(pair, tmp_path):
    """Autocast over a float32 student, and a hollow teacher whose weights are bfloat16."""
    family, student, teacher, columns = pair
    source = _Given(own_logits(family, teacher, columns))
    if family != "llava":
        hollow_out(teacher)
    trainer = trainer_of(student, teacher, columns, tmp_path, source=source)
    batch = columns | {"has_image": torch.ones(2, dtype=torch.bool)}
    exact = trainer.compute_loss(student, batch).detach()
    teacher.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = trainer.compute_loss(student, batch)
        assert trainer._idle_vision(student).isfinite()
    torch.testing.assert_close(loss.detach(), exact, rtol=1e-2, atol=0, check_dtype=False)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def text_rows(count=1, length=9):
    """Samples without an image, one column of padding at their end."""
    ids = torch.randint(20, 90, (count, length + 1), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(length + 1) < length).long().repeat(count, 1)
    ids = ids * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where((torch.arange(length + 1) > 3) & mask.bool(), ids, -100),
    }


def together(columns, text):
    """One batch of both, padded to one length."""
    width = max(columns["input_ids"].shape[1], text["input_ids"].shape[1])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return columns | {
        name: torch.cat(
            [
                torch.nn.functional.pad(part[name], (0, width - part[name].shape[1]), value=value)
                for part in (columns, text)
            ]
        )
        for name, value in fill.items()
    }


def test_samples_with_and_without_images_add_up(pair, tmp_path):
    """A batch of both costs what two batches cost; packed rows, too."""
    family, student, teacher, columns = pair
    columns, text = with_room(columns), text_rows()
    mixed = together(columns, text)
    trainer = trainer_of(student, teacher, columns, tmp_path)

    def total(part, images, **more):
        batch = part | more | {"has_image": torch.arange(len(part["input_ids"])) < images}
        return (trainer.compute_loss(student, batch) * predicting_rows(part["labels"]).sum()).detach()

    wanted = total(columns, 2) + total(text, 0)
    torch.testing.assert_close(total(mixed, 2), wanted, rtol=1e-5, atol=1e-4)
    if family in PACKING:
        lengths, width = mixed["attention_mask"].sum(-1).tolist(), mixed["input_ids"].shape[1]
        rows = {"packing": layout([[0], [1, 2]], lengths, width), "switch_packing": layout([[1, 0]], lengths, width)}
        torch.testing.assert_close(total(mixed, 2, **rows), wanted, rtol=1e-5, atol=1e-4)
