"""A share of the image samples on the switch pathway: drawn by seed, epoch and sample, without bias, and resumed exactly."""

import json
import tempfile
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from training import Stop, assert_same_weights, history, interrupt_after, logged, two_processes, weights
from transformers import TrainingArguments

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError
from switchkd.losses.objective import Objective
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.switch import of_samples
from switchkd.models.vlm import freeze, load_model
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.batches.switch_share import SwitchShare
from switchkd.pipelines.training.cost_model import CostModel
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.metrics import StepMetrics
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, hidden, options = training.cached, training.hidden, training.options
SHARE = 0.25  # VSD times 4: exact in the float32 that norms of a model compute in


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 1), st.integers(0, 99), st.integers(0, 3))
def test_draws_depend_on_seed_epoch_and_sample_alone(share, seed, epoch):
    draw = SwitchShare(share, seed)
    taken = [draw.takes(epoch, sample) for sample in range(400)]
    assert taken == [SwitchShare(share, seed).takes(epoch, sample) for sample in range(400)]
    assert abs(np.mean(taken) - share) < 5 * (share * (1 - share) / 400) ** 0.5 + 1e-9
    if 0.2 < share < 0.8:
        others = [SwitchShare(share, seed + 1), draw, draw]
        epochs, shifts = [epoch, epoch + 1, epoch], [0, 0, 1]
        for other, at, shift in zip(others, epochs, shifts, strict=True):
            assert taken != [other.takes(at, sample + shift) for sample in range(400)]


@pytest.fixture(scope="module")
def samples(student, cached):
    """Three samples with an image, one of text alone between them."""
    encoder = SampleEncoder(open_checkpoint(student), TEMPLATES["qa"], cached / "images", 128)
    return [encoder.encode(SampleFile(cached / "data.json")[row]) for row in (1, 3, 2, 5)]


@pytest.fixture(scope="module")
def trainer(student, teacher):
    model = load_model(open_checkpoint(student), dtype="float64").train()
    whole = freeze(load_model(open_checkpoint(teacher), dtype="float64"))
    return SwitchTrainer(
        objective=Objective(align_weight=0.7, vsd_weight=0.4),
        source=LiveTeacher(whole, 15),
        teacher=whole,
        vsd_share=SHARE,
        model=model,
        args=TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", remove_unused_columns=False),
    )


def terms_and_gradients(trainer, samples, row_tokens):
    batch = Collator(0, row_tokens=row_tokens)([(sample, 0) for sample in samples])
    trainer.model.zero_grad()
    loss = trainer.loss_terms(trainer.model, Batch.of(batch))
    loss.total.backward()
    vsd = torch.zeros(()).double() if loss.terms.vsd is None else loss.terms.vsd
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.model.parameters()]
    return [loss.total.detach(), loss.terms.ce, loss.terms.align, vsd, *gradients]


@pytest.mark.parametrize("row_tokens", (None, 40), ids=("padded", "packed"))
def test_the_mean_over_all_draws_is_all_samples(trainer, samples, row_tokens, monkeypatch):
    """Every draw of three samples with its probability: loss, VSD and all gradients."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "vsd_share", 1.0)
        whole = terms_and_gradients(trainer, samples, row_tokens)
    assert whole[3] > 0
    mean, values = [torch.zeros_like(each) for each in whole], set()
    for draw in product((False, True), repeat=3):
        chosen = iter(draw)
        drawn = [replace(s, switched=next(chosen)) if s.media is not None else s for s in samples]
        found = terms_and_gradients(trainer, drawn, row_tokens)
        values.add(round(float(found[3]), 9))
        chance = SHARE ** sum(draw) * (1 - SHARE) ** (3 - sum(draw))
        mean = [a + chance * b for a, b in zip(mean, found, strict=True)]
    assert len(values) == 8
    for mine, expected in zip(mean, whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row_tokens", (None, 40), ids=("padded", "packed"))
def test_flops_count_the_images_that_pass(trainer, samples, row_tokens):
    """Of two micro-batches, all three images pass in one, and one of three in the other."""
    cost_model = CostModel(trainer.model, trainer.teacher, trainer.source.teacher, 0, 4)
    metrics = StepMetrics(cost_model, knees=False, window=None)
    chosen = iter((True, False, False))
    drawn = [replace(s, switched=next(chosen)) if s.media is not None else s for s in samples]
    for each in (samples, drawn):
        metrics.count(Batch.of(Collator(0, row_tokens=row_tokens)([(sample, 0) for sample in each])))
    assert metrics.work().switched_share == pytest.approx(4 / 6)
    found = metrics.take(trainer.accelerator, 1.0, None)
    assert found["tflops_per_second"] * found["seconds"] * 1e12 == pytest.approx(
        cost_of(cost_model, samples, drawn, row_tokens)
    )


def cost_of(cost_model, *batches_and_row_tokens):
    """FLOP of micro-batches, each counted by itself."""
    *batches, row_tokens = batches_and_row_tokens
    total = 0.0
    for each in batches:
        metrics = StepMetrics(cost_model, knees=False, window=None)
        metrics.count(Batch.of(Collator(0, row_tokens=row_tokens)([(sample, 0) for sample in each])))
        total += cost_model.flops(metrics.work())
    return total


def test_several_images_of_a_sample_go_together(trainer):
    token = trainer.teacher.config.image_token_id
    ids = torch.tensor([[token] * 6 + [1], [token] * 3 + [1] * 4, [1] * 7, [token] * 3 + [1] * 4])
    features = torch.arange(4.0).view(4, 1, 1).expand(4, 3, 2)
    for samples, images in (((1, 0, 0, 0), [0, 1]), ((0, 1, 0, 1), [2, 3]), ((0, 0, 0, 0), [])):
        found = of_samples(torch.tensor(samples).bool(), features, ids, trainer.teacher)
        assert found[:, 0, 0].tolist() == images


def test_a_run_resumes_exactly_however_its_steps_are_divided(options, hidden, monkeypatch, tmp_path):
    shared = replace(options, cache=hidden, vsd_share=0.5)
    train(replace(shared, output=tmp_path / "whole"))
    train(replace(shared, output=tmp_path / "divided", batch_size=2, accumulation=2, packing=40))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(shared)
    with pytest.raises(ConfigError, match=r"vsd_share: run 0\.5, now 0\.25"):
        train(replace(shared, vsd_share=0.25))
    train(shared)
    assert history(shared.output) == history(tmp_path / "whole")
    assert_same_weights(weights(shared.output), weights(tmp_path / "whole"))
    training.assert_equal_runs(tmp_path / "divided", tmp_path / "whole")
    train(replace(options, cache=hidden, output=tmp_path / "all"))
    mine, everything = (logged(run) for run in (tmp_path / "whole", tmp_path / "all"))
    assert [e["loss_ce"] for e in mine][:2] == [e["loss_ce"] for e in everything][
        :2
    ]  # the first step has no learning rate
    assert [e["loss_vsd"] for e in mine] != [e["loss_vsd"] for e in everything]


def test_a_share_of_one_is_all(options, hidden, tmp_path):
    train(replace(options, cache=hidden, steps=2, vsd_share=1.0))
    train(replace(options, cache=hidden, steps=2, output=tmp_path / "all"))
    assert history(options.output) == history(tmp_path / "all")


@pytest.mark.parametrize("share", (1e-6, 0.5))
def test_an_adapter_has_a_gradient_in_every_step(options, hidden, share):
    """Also where no sample passes the switch pathway, since Adam leaves a weight without one as it is."""
    train(replace(options, cache=hidden, steps=2, vsd_share=share, switch_adapter="linear"))


@pytest.mark.slow
def test_over_two_processes(options, hidden, tmp_path):
    changed = {"vsd_share": 0.5, "switch_adapter": "linear"}
    train(replace(options, cache=hidden, **changed))
    done = two_processes(options, tmp_path, cache=hidden, batch_size=2, **changed)
    assert done.returncode == 0, done.stderr
    training.assert_equal_runs(tmp_path / "two", options.output)


def test_what_does_not_go_together(options):
    with pytest.raises(ConfigError, match="--vsd-share belongs to the switch pathway"):
        replace(options, vsd_share=0.5, switch=False)
    with pytest.raises(ConfigError, match="which --profile fsdp cannot: pass --profile ddp"):
        replace(options, vsd_share=0.5, profile="fsdp")
    with pytest.raises(ConfigError, match="vsd_share should be a number above 0 and at most 1, got 0"):
        replace(options, vsd_share=0)


def test_held_out_samples_all_pass_the_switch_pathway(options, hidden, tmp_path):
    """With copies of the weights, too, which an evaluation reads and a saved student does not hold."""
    evaluated = replace(
        options,
        cache=hidden,
        steps=1,
        eval_data=options.data,
        eval_images=options.images,
        eval_cache=hidden,
        keep_best="vsd",
    )
    found = {}
    for name, changed in {
        "all": {"precision": "bfloat16"},
        "share": {"precision": "bfloat16", "vsd_share": 0.25},
        "copies": {"precision": "bfloat16-copies", "vsd_share": 0.25},
    }.items():
        train(replace(evaluated, output=tmp_path / name, **changed))
        entries = json.loads((tmp_path / name / "summary.json").read_text())["history"]
        found[name] = next(entry for entry in entries if "eval_loss_vsd" in entry)
    assert found["share"]["eval_loss_vsd"] == found["all"]["eval_loss_vsd"]
    for name in ("eval_loss_ce", "eval_loss_vsd"):
        assert found["copies"][name] == pytest.approx(found["all"][name], rel=5e-2)
    assert found["copies"]["eval_loss_ce"] != found["all"]["eval_loss_ce"]
    assert {value.dtype for value in weights(tmp_path / "copies").values()} == {torch.float32}
