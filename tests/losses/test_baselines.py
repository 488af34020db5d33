"""LLaVA-KD, Align-KD and CompoDistill: each term against a loop, and a run whose losses are those of the two models run by hand."""

from dataclasses import replace

import baseline_runs
import pytest
import reference
import tiny
import torch
import training
from baseline_runs import by_hand, compare, history, normal
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses import baselines
from switchkd.losses.objective import Objective
from switchkd.pipelines.training.student_parts import part_of
from switchkd.pipelines.training.train import train

cached, options, live = training.cached, training.options, baseline_runs.live


@pytest.mark.parametrize(("tokens", "rows"), [(1, 2), (3, 47), (9, 15)])
def test_llava_kd_terms_are_the_loops(tokens, rows):
    student, teacher = normal(tokens, rows).requires_grad_(), normal(tokens, rows, seed=1)
    visual, relation = baselines.llava_kd_terms(student, teacher)
    compare(visual, reference.visual_kl(student, teacher), student)
    compare(relation, reference.relation(student, teacher), student)


def test_llava_kd_terms_vanish_at_the_teacher():
    z = normal(4, 9)
    torch.testing.assert_close(baselines.llava_kd_terms(z, z), torch.zeros(2, dtype=torch.float64))
    # The relation loss does not see a common factor, the visual one does.
    assert baselines.relation_loss(3 * z, z) < 1e-12 < baselines.visual_kl(3 * z, z)


@pytest.mark.parametrize(
    ("tokens", "texts", "heads", "widths"), [(1, 1, (1, 1), (3, 2)), (20, 3, (4, 2), (6, 5)), (16, 2, (2, 3), (4, 4))]
)
def test_align_kd_terms_are_the_loops(tokens, texts, heads, widths):
    adapters = baselines.AlignAdapters(widths, heads).double()
    mine, theirs = normal(tokens, widths[1]).requires_grad_(), normal(tokens, widths[0], seed=1)
    my_map = normal(heads[1], texts, tokens, seed=2).softmax(-1).requires_grad_()
    their_map = normal(heads[0], texts, tokens, seed=3).softmax(-1)
    every, focused, attention = baselines.align_kd_terms((mine, theirs), (my_map, their_map), adapters)
    adapted = torch.stack([adapters.tokens.weight @ token + adapters.tokens.bias for token in theirs])
    chosen = reference.focus(their_map, 16)
    learned = tuple(adapters.tokens.parameters())
    compare(every, reference.mean_square(mine, adapted), mine, *learned)
    compare(focused, reference.mean_square(mine[chosen], adapted[chosen]), mine, *learned)
    mixed = reference.mixed_heads(their_map, adapters.heads.weight, adapters.heads.bias)
    compare(attention, reference.mean_square(my_map, mixed), my_map, *adapters.heads.parameters())


def test_the_most_attended_tokens_are_the_teachers_sixteen():
    attention = normal(3, 4, 30).softmax(-1)
    assert baselines.most_attended(attention).tolist() == reference.focus(attention, 16)
    assert len(baselines.most_attended(attention[:, :, :5])) == 5


def causal(layers, tokens, seed):
    """Attention maps of tokens that see themselves and those before, in float64; a text before them takes a share."""
    scores = normal(layers, tokens, tokens + 1, seed=seed) * 2
    hidden = torch.ones(tokens, tokens + 1).triu(2).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, 1:]


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (1, 2), (3, 5), (7, 12)])
def test_the_term_of_compodistill_is_the_loop(layers, tokens):
    student, teacher = causal(layers, tokens, 0).requires_grad_(), causal(layers, tokens, 1)
    compare(baselines.visual_attention_loss(student, teacher), reference.visual_attention(student, teacher), student)


def test_the_term_of_compodistill_vanishes_at_the_teacher_and_ignores_peaks():
    maps = causal(2, 9, 4)
    torch.testing.assert_close(baselines.visual_attention_loss(maps, maps), torch.zeros((), dtype=torch.float64))
    assert baselines.visual_attention_loss(3 * maps, maps) < 1e-9  # a cosine does not see a common factor
    student = causal(2, 9, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(baselines.visual_attention_loss(student, maps), student)
    for mine, theirs, moved in zip(student.detach(), maps, gradient, strict=True):
        peaks = (mine > mine.mean() + mine.std()) | (theirs > theirs.mean() + theirs.std())
        assert peaks.any() and not moved[peaks].any() and not moved.triu(1).any() and moved.any()
    even = torch.full((1, 4, 4), 0.25, dtype=torch.float64).tril()
    assert baselines.visual_attention_loss(even, even) == 0


@pytest.mark.parametrize(
    ("depths", "student", "first_group", "last_group"),
    [
        ((24, 24), range(8, 15), (8, 9), (14, 15)),
        ((24, 40), range(8, 15), (13, 14, 15, 16, 17), (19, 20, 21, 22, 23)),
        ((28, 28), range(9, 16), (9, 10, 11), (15, 16, 17)),
        ((24, 32), range(8, 15), (11, 12, 13), (17, 18, 19)),
        ((4, 6), (1,), (2, 3), (2, 3)),
        ((2, 3), (1,), (1,), (1,)),
        ((1, 1), (0,), (0,), (0,)),
    ],
)
def test_the_middle_layers_are_those_of_the_released_code(depths, student, first_group, last_group):
    found = baselines.middle_layers(*depths)
    assert found.student == tuple(student)
    assert len(found.teacher) == len(found.student)
    assert (found.teacher[0], found.teacher[-1]) == (first_group, last_group)
    for depth, layers in zip(depths, (found.student, sum(found.teacher, ())), strict=True):
        assert all(0 <= layer < depth for layer in layers)


def test_llava_kd_trains_on_what_two_models_say_by_hand(live, cached):
    run = live("llava-kd", batch_size=12, steps=1)
    train(run)
    (student, teacher), rows, has_image, is_image, _ = by_hand(run, cached)
    logged = history(run.output)[0]
    pairs = [
        (student[0][i][is_image[i]].double(), teacher[0][i][is_image[i]].double())
        for i in has_image.nonzero().flatten()
    ]
    assert len(pairs) == 11
    expected = {
        "align": reference.visual_kl(student[0][rows], teacher[0][rows]),
        "visual": sum(reference.visual_kl(*pair) for pair in pairs) / len(pairs),
        "relation": sum(reference.relation(*pair) for pair in pairs) / len(pairs),
    }
    for name, value in expected.items():
        assert logged[f"loss_{name}"] == pytest.approx(float(value), rel=1e-4), name
    assert logged["loss"] == pytest.approx(logged["loss_ce"] + sum(map(float, expected.values())), rel=1e-4)


def test_compodistill_trains_on_what_two_models_attend_to_by_hand(live, cached):
    run = live("compodistill", batch_size=12, steps=1)
    train(run)
    (student, teacher), rows, has_image, is_image, _ = by_hand(run, cached)
    layers = baselines.middle_layers(len(student[3]), len(teacher[3]))
    total, images = 0.0, [int(i) for i in has_image.nonzero().flatten()]
    for i in images:
        block = [
            [maps[i].double().mean(0)[is_image[i]][:, is_image[i]] for maps in model[3]] for model in (student, teacher)
        ]
        mine = torch.stack([block[0][layer] for layer in layers.student])
        theirs = torch.stack([sum(block[1][layer] for layer in group) / len(group) for group in layers.teacher])
        total += float(reference.visual_attention(mine, theirs))
    logged = history(run.output)[0]
    assert logged["loss_visual_attention"] == pytest.approx(total / len(images), rel=1e-3)
    assert logged["loss_align"] == pytest.approx(
        float(reference.visual_kl(student[0][rows], teacher[0][rows])), rel=1e-4
    )
    parts = logged["loss_ce"] + logged["loss_align"] + logged["loss_visual_attention"]
    assert logged["loss"] == pytest.approx(parts, rel=1e-4)


def test_align_kd_trains_on_what_two_models_show_by_hand(live, cached, monkeypatch):
    made = []
    original = baselines.AlignAdapters.__init__

    def keep(self, *args):
        original(self, *args)
        made.append({name: p.detach().clone().double() for name, p in self.named_parameters()})

    monkeypatch.setattr(baselines.AlignAdapters, "__init__", keep)
    run = live("align-kd", batch_size=12, steps=1)
    train(run)
    (adapters,) = made
    (student, teacher), _, has_image, is_image, there = by_hand(run, cached)
    sums = {"tokens": 0.0, "focus": 0.0, "attention": 0.0}
    images = [int(i) for i in has_image.nonzero().flatten()]
    for number, i in enumerate(images):
        last = int(is_image[i].nonzero().max())
        texts = [j for j in range(last + 1, is_image.shape[1]) if there[i, j]]
        maps = [model[2][i].double()[:, texts][:, :, is_image[i]] for model in (student, teacher)]
        tokens = [model[1][number].double() for model in (student, teacher)]
        adapted = torch.stack([adapters["tokens.weight"] @ t + adapters["tokens.bias"] for t in tokens[1]])
        chosen = reference.focus(maps[1], 16)
        mixed = reference.mixed_heads(maps[1], adapters["heads.weight"], adapters["heads.bias"])
        sums["tokens"] += float(reference.mean_square(tokens[0], adapted))
        sums["focus"] += float(reference.mean_square(tokens[0][chosen], adapted[chosen]))
        sums["attention"] += float(reference.mean_square(maps[0], mixed))
    logged = history(run.output)[0]
    for name, value in sums.items():
        assert logged[f"loss_{name}"] == pytest.approx(value / len(images), rel=1e-4), name
    terms = sum(baselines.TERM_WEIGHTS[name] * value / len(images) for name, value in sums.items())
    assert logged["loss"] == pytest.approx(logged["loss_ce"] + logged["loss_align"] + terms, rel=1e-4)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_accumulation_changes_nothing(live, tmp_path, name):
    """Micro-batches of one sample, one of them text alone; means are over the images of the whole step."""
    train(live(name, batch_size=12, steps=1))
    small = live(name, batch_size=1, accumulation=12, steps=1, output=tmp_path / "small")
    train(small)
    whole = live(name)
    for key, value in history(whole.output)[0].items():
        if key.startswith("loss"):
            assert history(small.output)[0][key] == pytest.approx(value, rel=1e-4), key
    training.assert_same_weights(training.weights(whole.output), training.weights(small.output), rtol=1e-3, atol=1e-4)


def test_the_adapters_train_and_stay_out_of_the_student(live):
    run = live("align-kd", steps=4)
    train(run)
    first, last = (load_file(run.output / f"checkpoint-{n}/model.safetensors") for n in (2, 4))
    adapters = [name for name in first if name.startswith(f"{baselines.ADAPTERS}.")]
    assert len(adapters) == 4
    assert all(not torch.equal(first[name], last[name]) for name in adapters)
    assert part_of(adapters[0]) == "adapters"
    _, report = LlavaForConditionalGeneration.from_pretrained(run.output, output_loading_info=True)
    assert not report["unexpected_keys"]


def test_a_resumed_run_equals_an_undisturbed_one(live, tmp_path, monkeypatch):
    name = "align-kd"  # whose adapters are resumed too
    whole = live(name, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 5)
        with pytest.raises(training.Stop):
            train(live(name))
    train(live(name))
    training.assert_same_weights(training.weights(live(name).output), training.weights(whole.output))
    assert history(live(name).output)[-1]["loss"] == history(whole.output)[-1]["loss"]


def test_a_projector_stage_takes_a_baseline_too(live, student):
    run = live("llava-kd", train_parts="projector", steps=2)
    train(run)
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).state_dict() for f in (student, run.output))
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"projector"}


@pytest.mark.slow
@pytest.mark.parametrize("name", baselines.BASELINES)
def test_two_processes_equal_one(live, tmp_path, name):
    train(live(name, steps=3, batch_size=4))
    flags = {"objective": name, "teacher_mode": "live", "template": "qa", "steps": 3, "batch_size": 2}
    prelude = "import sys\nsys.argv.append('--no-switch')"
    done = training.two_processes(live(name), tmp_path, prelude, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(history(live(name).output), history(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    training.assert_same_weights(
        training.weights(live(name).output), training.weights(tmp_path / "two"), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llava-kd",
            {"teacher_mode": "cached"},
            "logits at visual tokens, which no store holds: pass --teacher-mode live",
        ),
        ("align-kd", {"teacher_mode": "cached"}, "visual tokens and attention, which no store holds"),
        ("align-kd", {"profile": "fsdp"}, "trains with --profile ddp only"),
        ("llava-kd", {"switch": True}, "objective llava-kd has no switch pathway: pass --no-switch"),
        ("llava-kd", {"teacher": None}, "--teacher-mode live runs the teacher: pass --teacher"),
    ],
)
def test_what_a_baseline_needs_is_said_before_anything_runs(live, name, change, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(live(name), **change))
    assert not live(name).output.exists()


def test_an_llm_without_llamas_layers_is_named():
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"language_model": torch.nn.Linear(1, 1)})})
    with pytest.raises(CheckpointError, match="layers.0.self_attn of the LLM, which Linear does not have"):
        baselines.attention_of(model, 0)


def test_the_objective_of_a_baseline_is_forward_kl_at_temperature_one():
    from switchkd.losses import kl_loss
    from switchkd.losses.signals import DenseSignal

    student, teacher = normal(3, 7), normal(3, 7, seed=1)
    for name in baselines.BASELINES:
        found = Objective(name, switch=False).divergence(student, DenseSignal(teacher))
        torch.testing.assert_close(found, kl_loss(student, teacher, reduction="sum"))


def test_tiny_images_have_fewer_than_sixteen_tokens():
    """So that the choice of all of them is tested by the run above, and the choice of some by the loops."""
    assert (tiny.vision_config().image_size // tiny.vision_config().patch_size) ** 2 < baselines.FOCUS_TOKENS
