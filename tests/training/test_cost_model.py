"""Arithmetic against what really happens: FLOPs as torch counts them, memory as one step keeps it."""

import copy

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from training import kept_bytes

from switchkd.losses.fused import SwitchStates
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import Objective
from switchkd.losses.signals import HiddenSignal
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.components import replace_lm_head
from switchkd.models.features import capture_features
from switchkd.models.lora import attach_lora
from switchkd.models.switch import switch_states
from switchkd.models.vlm import enable_activation_checkpointing, freeze, load_model
from switchkd.pipelines.training.cost_model import CostModel, Work, count_parameters
from switchkd.pipelines.training.student_parts import freeze_other_parts
from switchkd.positions import predicting_rows, targets
from switchkd.settings import Lora

ROWS, LENGTH, VISION = 3, 24, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a teacher whose layers outweigh everything else."""
    folder = tmp_path_factory.mktemp("models")
    vision = tiny.vision_config(width=64, layers=3, size=32)
    student = tiny.checkpoint(folder / "student", 1, width=64, layers=4, vision=vision)
    teacher = tiny.checkpoint(folder / "teacher", 2, width=96, layers=5, vision=vision)
    return [load_model(open_checkpoint(path), dtype="float32") for path in (student, teacher)]


def batch():
    """Rows with an image and supervised text behind it, none of it padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 14, (ROWS, LENGTH), generator=generator)
    ids[:, :VISION] = 2
    labels = ids.clone()
    labels[:, : VISION + 2] = -100
    return ids, labels, torch.randn(ROWS, 3, 32, 32, generator=generator)


def step(student, teacher, switch=True):
    """Forward and backward of what `SwitchTrainer` computes, with the teacher's states given."""
    ids, labels, pixels = batch()
    rows, mask = predicting_rows(labels), torch.ones_like(ids)
    count = int(rows.sum())
    signal = HiddenSignal(torch.randn(count, 96), teacher.lm_head.weight.detach())

    def loss(states):
        through = None
        if switch:
            hidden = switch_states(teacher, features, ids, mask, rows)
            through = SwitchStates(hidden, LMHead(teacher.lm_head.weight), torch.ones(count, dtype=torch.bool))
        head = LMHead(student.lm_head.weight)
        return Objective(switch=switch).fused(states, head, targets(labels), signal, through).total

    with capture_features(student) as features, replace_lm_head(student, loss):
        total = student(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=rows, use_cache=False
        ).logits
    return total, count


@pytest.mark.parametrize(
    ("parts", "switch"),
    [
        ("vision,projector,language", True),
        ("vision,projector,language", False),
        ("projector", False),
        ("vision,projector", True),
    ],
)
def test_flops_are_those_that_torch_counts(models, parts, switch):
    student, teacher = models
    student.requires_grad_(True)
    freeze(teacher)
    freeze_other_parts(student, set(parts.split(",")))
    for model in models:
        model.set_attn_implementation("eager")  # torch does not count its CPU kernel of fused attention
    with FlopCounterMode(display=False) as counter:
        total, count = step(student, teacher, switch)
        total.backward()
    for model in models:
        model.set_attn_implementation("sdpa")
    cost_model = CostModel(student, teacher if switch else None, None, teacher.lm_head.weight.numel(), VISION)
    work = Work(ROWS * LENGTH, ROWS * LENGTH**2, ROWS, ROWS * LENGTH, ROWS * LENGTH**2, count, count)
    assert cost_model.flops(work) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("switch", (True, False))
@pytest.mark.parametrize("parts", ("vision,projector,language", "projector"))
def test_activations_are_estimated_within_a_third(models, parts, switch):
    """The factor that docs/training.md states."""
    if switch and "vision" not in parts:
        pytest.skip("no such run")
    student, teacher = models
    student.requires_grad_(True)
    freeze(teacher)
    freeze_other_parts(student, set(parts.split(",")))
    with kept_bytes(models) as kept:
        total, _ = step(student, teacher, switch)
    measured = sum(size for size, _ in kept.values())
    assert total.requires_grad
    cost_model = CostModel(student, teacher if switch else None, None, 0, VISION)
    estimate = cost_model.memory(ROWS, LENGTH, processes=1, sharded=None, half=False)["activations"]
    print(parts, switch, measured, estimate, measured / estimate)
    assert 1 / 1.34 < measured / estimate < 1.34


def test_weights_gradients_and_optimizer_are_exact(models):
    student, teacher = models
    student.requires_grad_(True)
    freeze(teacher)
    optimizer = torch.optim.AdamW(student.parameters())
    step(student, teacher)[0].backward()
    optimizer.step()
    memory = CostModel(student, teacher, teacher, 0, VISION).memory(ROWS, LENGTH, processes=1, sharded=None, half=False)
    held = [state for states in optimizer.state.values() for name, state in states.items() if name != "step"]
    with_gradient = [p for p in student.parameters() if p.grad is not None]
    assert memory["student"] == sum(p.nbytes for p in student.parameters())
    assert memory["teacher"] == sum(p.nbytes for p in teacher.parameters())
    # post_layernorm gets no gradient here; a run freezes it first
    unused = sum(p.nbytes for p in student.parameters()) - sum(p.nbytes for p in with_gradient)
    assert memory["gradients"] == sum(p.grad.nbytes for p in with_gradient) + unused
    assert memory["optimizer"] == sum(state.nbytes for state in held) + 2 * unused
    student.zero_grad()


@pytest.mark.parametrize("who", ("student", "teacher"))
def test_checkpointed_layers_keep_their_inputs_and_one_at_a_time_the_rest(models, who):
    student, teacher = copy.deepcopy(models)
    student.requires_grad_(True)
    freeze(teacher)

    def activations(switch, **more):
        cost_model = CostModel(student, switch, None, 0, VISION)
        return cost_model.memory(ROWS, LENGTH, processes=1, sharded=None, half=False, **more)["activations"]

    alone, both = activations(None), activations(teacher)
    if who == "student":  # float32; 4 layers of width 64 see the text, 3 the image
        inputs, others, one_layer = 4 * 64 * ROWS * (4 * LENGTH + 3 * VISION), both - alone, alone / 3
        enable_activation_checkpointing(student.model.vision_tower, student.model.language_model)
    else:
        inputs, others, one_layer = 4 * 96 * ROWS * 5 * LENGTH, alone, (both - alone) / 5
        enable_activation_checkpointing(teacher.model.language_model)
    estimate = activations(teacher, **{f"{who}_checkpointed": True})
    assert inputs + others < estimate <= inputs + others + one_layer
    with kept_bytes((student, teacher)) as kept:
        step(student, teacher)
    measured = sum(size for size, _ in kept.values())
    assert 1 / 1.34 < measured / (inputs + others) < 1.34


def test_sharding_divides_what_it_shards(models):
    student, teacher = models
    cost_model = CostModel(student, teacher, None, 0, VISION)
    alone, fsdp, zero3 = (
        cost_model.memory(1, LENGTH, processes=4, sharded=sharded, half=False) for sharded in (None, "all", "student")
    )
    for kind in ("student", "gradients", "optimizer"):
        assert fsdp[kind] == zero3[kind] == alone[kind] / 4
    assert alone["teacher"] == zero3["teacher"] > fsdp["teacher"] > alone["teacher"] / 4
    assert fsdp["activations"] == alone["activations"]


def test_parameters_are_counted_by_part(models):
    student = models[0]
    student.requires_grad_(True)
    freeze_other_parts(student, {"projector"})
    counts = count_parameters(student)
    assert [name for name, (_, trained) in counts.items() if trained] == ["projector"]
    assert sum(every for every, _ in counts.values()) == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("parts", ("language", "language,vision"))
def test_lora_is_counted(models, parts, dropout):
    """FLOPs within 5 %, weights, gradients and optimizer exact, activations within a third, as above."""
    pytest.importorskip("peft", reason="--lora needs peft: extra `lora`")
    student, teacher = copy.deepcopy(models)
    freeze(teacher)
    attach_lora(student.requires_grad_(True), Lora(8, 16, dropout, frozenset(parts.split(","))), seed=0)
    student.train()
    student.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        total, count = step(student, teacher, switch=False)
        total.backward()
    cost_model = CostModel(student, None, None, teacher.lm_head.weight.numel(), VISION)
    work = Work(ROWS * LENGTH, ROWS * LENGTH**2, ROWS, 0, 0, count, 0)
    assert cost_model.flops(work) == pytest.approx(counter.get_total_flops(), rel=0.05)

    memory = cost_model.memory(ROWS, LENGTH, processes=1, sharded=None, half=False)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert memory["student"] == sum(p.nbytes for p in student.parameters())
    assert memory["gradients"] == sum(p.nbytes for p in trained)
    student.set_attn_implementation("sdpa")
    with kept_bytes((student, teacher)) as kept:
        step(student, teacher, switch=False)
    assert 1 / 1.34 < sum(size for size, _ in kept.values()) / memory["activations"] < 1.34
    counts = count_parameters(student)
    lora = sum(p.numel() for name, p in student.named_parameters() if "lora_" in name and "language" in name)
    assert counts["language"][1] == lora


@pytest.mark.parametrize("share", (0.0, 1 / 3, 1.0))
def test_the_projector_of_the_switch_pathway_is_counted_for_images_that_pass_it(models, share):
    """Forward and backward of the teacher's frozen projector, by torch's count; everything else as it was."""
    student, teacher = models
    cost_model = CostModel(student, freeze(teacher), None, 0, VISION)
    work = Work(ROWS * LENGTH, ROWS * LENGTH**2, ROWS, share * ROWS * LENGTH, share * ROWS * LENGTH**2, 9, 9 * share)
    features = torch.randn(round(share * ROWS), VISION, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        teacher.model.multi_modal_projector(features).sum().backward()
    without = cost_model.flops(work._replace(switched_share=0.0))
    assert cost_model.flops(work._replace(switched_share=share)) - without == counter.get_total_flops()
