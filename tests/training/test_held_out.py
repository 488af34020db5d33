"""A student evaluated on held-out samples while it trains: the right numbers, without a trace in what is trained."""

import json
import os
import shutil
import signal
from dataclasses import replace

import families
import numpy as np
import pytest
import reference
import tiny
import torch
import training
from safetensors.torch import load_file
from training import Stop, assert_same_weights, history, interrupt_after, two_processes, weights
from transformers import LlavaForConditionalGeneration

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, DataError, Stopped, StoreError, StoreMismatch
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.exact_match import evaluate
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.model_template import template_of_run
from switchkd.pipelines.release.export import export
from switchkd.pipelines.release.options import ExportOptions
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.report import report
from switchkd.pipelines.training.held_out import best
from switchkd.pipelines.training.option_groups.held_out import HeldOutOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.run_log import line_of_held_out
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.pipelines.visual_advantage import blurred_encoder

cached, hidden = training.cached, training.hidden
LOSSES = ("eval_loss", "eval_loss_ce", "eval_loss_align", "eval_loss_vsd")


@pytest.fixture(scope="module")
def held(teacher, tmp_path_factory):
    """Other samples than those that train, with images of their own, and their store."""
    folder = tmp_path_factory.mktemp("held")
    rows = tiny.rows(20, text_only=(13,), two_turns=(14,))[12:]
    data = tiny.data(folder, rows)
    cache_teacher(
        CacheOptions(
            teacher=teacher, data=data, images=folder / "images", out=folder / "stores/h.zarr", template="qa", part_size=5,
            payload="topk", fine=1 / 4096, coarse=1 / 4096,
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def plain(teacher, student, cached, tmp_path):
    return training.train_options(teacher, student, cached, tmp_path / "plain")


def held_out_options(held, **more):
    given = {"eval_data": held / "data.json", "eval_images": held / "images", "eval_cache": held / "stores"}
    return given | {"eval_every": 2} | more


@pytest.fixture
def options(plain, held, tmp_path):
    return replace(plain, output=tmp_path / "run", **held_out_options(held))


def evaluations(run, *, seconds=False):
    found = [e for e in json.loads((run / "summary.json").read_text())["history"] if "eval_loss_ce" in e]
    return found if seconds else [{name: v for name, v in e.items() if name != "eval_seconds"} for e in found]


@pytest.mark.parametrize("change", ({}, {"lora": 2, "lora_dropout": 0.2}, {"workers": 1, "packing": 64}))
def test_an_evaluation_leaves_no_trace(options, plain, change):
    """Weights, losses, random states: bit for bit those of a run that is not evaluated, also where dropout draws numbers."""
    if "lora" in change:
        pytest.importorskip("peft", reason="--lora needs peft: extra `lora`")
    for each in (options, plain):
        train(replace(each, **change))
    assert history(options.output) == history(plain.output)
    assert_same_weights(weights(options.output), weights(plain.output))
    for name in ("rng_0.json", "rng_0.safetensors", "optimizer.safetensors", "generation_config.json"):
        ours, theirs = ((run / "checkpoint-6" / name).read_bytes() for run in (options.output, plain.output))
        assert ours == theirs, name
    assert [entry["step"] for entry in evaluations(options.output)] == [2, 4, 6]


def test_generation_leaves_no_trace_in_a_model_with_positions_of_three_axes(tmp_path):
    """Qwen2.5-VL keeps what it knows of the last prompt's positions."""
    student = families.write_checkpoint("qwen2_5_vl", tmp_path / "student", 2)
    data = tiny.data(tmp_path / "data", tiny.rows(8, text_only=(3,), two_turns=(5,)))
    given = {"data": data, "images": data.parent / "images", "template": "qa", "objective": "sft", "switch": False}
    more = {"steps": 4, "batch_size": 2, "lr": 5e-3, "log_every": 1, "save_every": 2, "student": student}
    for name, evaluated in (("plain", {}), ("run", {"eval_data": data, "eval_every": 1})):
        train(TrainOptions(output=tmp_path / name, **given, **more, **evaluated))
    assert_same_weights(weights(tmp_path / "plain"), weights(tmp_path / "run"))
    assert len(evaluations(tmp_path / "run")) == 4


def test_losses_are_those_of_the_next_step_on_the_same_samples(plain, cached):
    """With all samples in every batch, step 2 computes its losses with the weights that were evaluated after step 1."""
    evaluated = {"eval_data": cached / "data.json", "eval_cache": cached / "stores", "eval_every": 1}
    options = replace(plain, batch_size=12, steps=3, **evaluated)
    train(options)
    steps, found = training.logged(options.output), evaluations(options.output)
    for evaluated, after in zip(found[:2], steps[1:], strict=True):
        for name in LOSSES:
            assert evaluated[name] == pytest.approx(after[name.removeprefix("eval_")], rel=1e-5, abs=1e-7)


def test_losses_are_those_of_whole_logits(options, held, teacher):
    """CE and Align of the finished student, written from eq. 4 over plain transformers' logits."""
    train(options)
    models = [LlavaForConditionalGeneration.from_pretrained(path).double().eval() for path in (options.output, teacher)]
    encoder = SampleEncoder(open_checkpoint(options.student), TEMPLATES["qa"], held / "images", 2048)
    ce = align = positions = 0
    for sample in SampleFile(held / "data.json"):
        batch = collate([encoder.encode(sample)], 0)
        pixels = {} if batch.get("pixel_values") is None else {"pixel_values": batch["pixel_values"].double()}
        with torch.no_grad():
            mine, theirs = (model(input_ids=batch["input_ids"], **pixels).logits[0, :-1] for model in models)
        labels = batch["labels"][0, 1:]
        for own, word, label in zip(mine, theirs, labels.tolist(), strict=True):
            if label >= 0:
                ce -= own.log_softmax(-1)[label].item()
                align += float(reference.dbild(own[None], word[None], 3.0, "reverse_kl"))
                positions += 1
    last = evaluations(options.output)[-1]
    assert last["eval_positions"] == positions
    assert last["eval_loss_ce"] == pytest.approx(ce / positions, rel=1e-5)
    assert last["eval_loss_align"] == pytest.approx(align / positions, rel=1e-3)


def test_the_students_visual_advantage_is_that_of_its_own_forward(options, held):
    """Mean and standard error over the images, from transformers' own logits; the text-only row is left out."""
    train(replace(options, batch_size=3))  # batches of 3, 3 and 1
    student = LlavaForConditionalGeneration.from_pretrained(options.output).double().eval()
    encoder = SampleEncoder(open_checkpoint(options.student), TEMPLATES["qa"], held / "images", 2048)
    gains = []
    for sample in SampleFile(held / "data.json"):
        sides = []
        for each in (encoder, blurred_encoder(encoder)) if sample.images else ():
            batch = collate([each.encode(sample)], 0)
            with torch.no_grad():
                logits = student(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"].double()).logits[0]
            wanted = [(row, label) for row, label in enumerate(batch["labels"][0, 1:].tolist()) if label >= 0]
            sides.append(sum(logits[row].log_softmax(-1)[label].item() for row, label in wanted))
        if sides:
            gains.append(sides[0] - sides[1])
    last = evaluations(options.output)[-1]
    assert last["eval_visual_advantage_samples"] == len(gains) == 7
    assert last["eval_visual_advantage"] == pytest.approx(np.mean(gains), rel=1e-3, abs=1e-5)
    assert last["eval_visual_advantage_error"] == pytest.approx(np.std(gains, ddof=1) / 7**0.5, rel=1e-3, abs=1e-5)
    assert "visual advantage +" in line_of_held_out(last | {"eval_seconds": 1.0}).replace("-", "+")


def test_samples_without_an_image_have_no_visual_advantage(options, held):
    """Nor is it computed on more samples than needed."""
    chosen = {
        "eval_samples": 1,
        "objective": "sft",
        "switch": False,
        "teacher": None,
        "cache": None,
        "eval_cache": None,
    }
    rows = json.loads((held / "data.json").read_text())
    text_only = options.output.parent / "text.json"
    text_only.write_text(json.dumps([row for row in rows if "image" not in row]))
    train(replace(options, **chosen, template="qa", eval_data=text_only))
    assert not any("visual" in name for entry in evaluations(options.output) for name in entry)


def test_exact_match_is_that_of_eval(options, held, tmp_path):
    """On all questions, of a student that has learned to answer some of them."""
    options = replace(
        options, steps=60, lr=2e-2, eval_every=20, log_every=10, objective="sft", switch=False, template="qa", teacher=None,
        cache=None, eval_cache=None,
    )  # fmt: skip
    train(options)
    given = {"data": held / "data.json", "images": held / "images", "output": tmp_path / "eval"}
    scores = evaluate(EvalOptions(model=options.output, **given))
    last = evaluations(options.output)[-1]
    assert (last["eval_exact_match"], last["eval_answers"]) == (pytest.approx(scores.accuracy), scores.questions)
    assert scores.accuracy > 0 and scores.questions == 9
    assert last["eval_loss"] == last["eval_loss_ce"] and "eval_loss_align" not in last


def test_packed_samples_are_evaluated_as_others(options, tmp_path):
    """Generation pads on the left, which the attention of packed rows cannot read."""
    train(options)
    packed = replace(options, output=tmp_path / "packed", packing=64)
    train(packed)
    for ours, theirs in zip(evaluations(options.output), evaluations(packed.output), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)


def test_the_numbers_of_samples_and_answers_are_bounded(options):
    train(replace(options, eval_samples=3, eval_answers=0))
    found = evaluations(options.output)
    assert all("eval_exact_match" not in entry for entry in found)
    assert found[0]["eval_positions"] < 9


def test_without_a_store_of_them_there_are_ce_and_exact_match(options):
    train(replace(options, eval_cache=None))
    for entry in evaluations(options.output):
        assert {name for name in entry if "loss" in name} == {"eval_loss_ce"}
        assert entry["eval_answers"] == 9


def test_a_live_teacher_evaluates_without_a_store(options, plain, tmp_path):
    train(options)
    live = replace(
        options, output=tmp_path / "live", teacher_mode="live", cache=None, eval_cache=None, template="qa", eval_images=None,
        images=options.images,
    )  # fmt: skip
    live = replace(live, eval_images=options.eval_images)
    train(live)
    for ours, theirs in zip(evaluations(options.output), evaluations(live.output), strict=True):
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-2, abs=1e-3)


def test_the_best_student_is_kept_and_a_resumed_run_finds_the_same(options, monkeypatch, tmp_path):
    options = replace(options, lr=5e-2, eval_every=1, save_every=1, keep=10, keep_best="align")
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    found = evaluations(whole.output)
    least = min(found, key=lambda entry: entry["eval_loss_align"])
    kept = best.read_best(whole.output)
    assert (kept["step"], kept["value"]) == (least["step"], least["eval_loss_align"])
    assert len(list(whole.output.glob("checkpoint-*"))) == 6
    # the names of its tensors are the published ones, as the finished student's
    opened, expected = (
        LlavaForConditionalGeneration.from_pretrained(whole.output / name).state_dict()
        for name in ("best", f"checkpoint-{least['step']}")
    )
    assert_same_weights(opened, expected)
    assert template_of_run(open_checkpoint(whole.output / "best")).name == "qa"
    assert json.loads((whole.output / "summary.json").read_text())["best"]["step"] == least["step"]

    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Stop):
            train(options)
    with pytest.raises(ConfigError, match="best is the best by align of .*; now it is ce of"):
        train(replace(options, keep_best="ce"))
    train(options)
    assert evaluations(options.output) == evaluations(whole.output)
    assert history(options.output) == history(whole.output)
    again = best.read_best(options.output)
    assert (again["step"], again["value"]) == (kept["step"], kept["value"])
    assert_same_weights(
        load_file(options.output / "best/model.safetensors"), load_file(whole.output / "best/model.safetensors")
    )

    made = export(ExportOptions(run=options.output, out=tmp_path / "exported", best=True))
    assert_same_weights(LlavaForConditionalGeneration.from_pretrained(made).state_dict(), opened)
    card = (made / "README.md").read_text()
    assert f"| steps | {kept['step']} |" in card and "chosen as the best by | align of held-out samples" in card


def test_a_signal_is_answered_first_and_the_evaluation_made_up(options, monkeypatch, tmp_path):
    """The checkpoint must be written in the time that a scheduler leaves."""
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    step = SwitchTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SwitchTrainer, "training_step", signalled)
        with pytest.raises(Stopped, match="after step 4"):
            train(options)
    saved = json.loads((options.output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in saved if "eval_loss_ce" in entry] == [2]
    train(options)
    assert evaluations(options.output) == evaluations(whole.output)
    assert history(options.output) == history(whole.output)
    assert all(entry["seconds"] < 600 for entry in training.logged(options.output))


def test_a_run_without_a_best_student_exports_none(plain, tmp_path):
    train(replace(plain, steps=1))
    with pytest.raises(ConfigError, match="has kept no best student"):
        export(ExportOptions(run=plain.output, out=tmp_path / "exported", best=True))


def test_a_best_student_is_never_lost(tmp_path):
    """Killed between the two renames: the new one is whole, and so is the one before."""
    for names, expected in ((("best", "best-before"), 7), (("best-before",), 5)):
        run = tmp_path / str(expected)
        for name in names:
            folder = run / ".unfinished" / name
            folder.mkdir(parents=True)
            step = 7 if name == "best" else 5
            (folder / "best.json").write_text(json.dumps({"metric": "ce", "value": 1.0, "held_out": "x", "step": step}))
        best.recover_best(run)
        assert best.read_best(run)["step"] == expected


def test_ties_and_missing_values_do_not_replace_the_best(tmp_path):
    for metric, better, worse in (("ce", 0.5, 1.5), ("exact-match", 1.0, 0.25)):
        keeper = best.BestStudent(tmp_path, metric, "x", {})
        name = best.NAMES[metric]
        assert not keeper.improves({}) and not keeper.improves({name: float("nan")})
        assert keeper.improves({name: 0.75})
        keeper.value = 0.75
        assert [keeper.improves({name: value}) for value in (0.75, better, worse)] == [False, True, False]


@pytest.mark.parametrize("keep", (1, 3))
def test_as_many_checkpoints_are_kept_as_asked(plain, keep):
    train(replace(plain, save_every=1, keep=keep))
    kept = sorted(int(path.name.rpartition("-")[2]) for path in plain.output.glob("checkpoint-*"))
    assert kept == list(range(7 - keep, 7))


@pytest.mark.parametrize(
    ("samples", "given", "global_batch", "every"),
    [(256, None, 128, 200), (256, None, 1_000_000, 1), (9, None, 16, 57), (256, 7, 128, 7)],
)
def test_by_default_a_hundred_times_as_many_samples_train_as_are_evaluated(samples, given, global_batch, every):
    assert HeldOutOptions(eval_every=given).every(samples, global_batch) == every


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
def test_two_processes_evaluate_as_one(options, tmp_path, profile):
    """One sample at a time, so that the processes have different numbers of batches, and images in some of them only."""
    options = replace(options, keep_best="ce")
    train(options)
    changed = held_out_options(options.eval_data.parent, keep_best="ce")
    done = two_processes(options, tmp_path, profile=profile, batch_size=1, accumulation=2, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "two"
    training.assert_equal_runs(options.output, run)
    for ours, theirs in zip(evaluations(options.output), evaluations(run), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert best.read_best(run)["step"] == best.read_best(options.output)["step"]
    LlavaForConditionalGeneration.from_pretrained(run / "best")


def test_the_student_of_a_baseline_is_evaluated_without_its_own_terms(options, plain):
    """By CE and exact match; the best one is saved without the adapters that train beside it."""
    live = {"objective": "llava-kd", "switch": False, "teacher_mode": "live", "cache": None, "template": "qa"}
    train(replace(plain, **live))
    train(replace(options, **live, eval_cache=None, keep_best="ce"))
    assert history(options.output) == history(plain.output)
    assert {name for name in evaluations(options.output)[0] if "loss" in name} == {"eval_loss_ce"}
    assert load_file(options.output / "best/model.safetensors").keys() == weights(options.output).keys()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eval_data": None}, ConfigError, "--eval-cache is about held-out samples: pass --eval-data, too"),
        ({"eval_data": "nowhere.json", "eval_cache": None}, DataError, "nowhere.json"),
        ({"eval_cache": "nowhere"}, StoreError, "no teacher store at nowhere"),
        ({"eval_cache": None, "keep_best": "align"}, ConfigError, "--keep-best align compares with the teacher"),
        ({"eval_cache": None, "keep_best": "loss"}, ConfigError, "--keep-best loss compares with the teacher"),
        ({"keep_best": "vsd", "switch": False}, ConfigError, "--keep-best vsd: the switch pathway is off"),
        ({"keep_best": "exact-match", "eval_answers": 0}, ConfigError, "asks no question, so it is never computed"),
        ({"keep_best": "accuracy"}, ConfigError, "keep_best is one of loss, ce, align, vsd, exact-match"),
        (
            {"keep_best": "align", "objective": "sft", "switch": False, "eval_cache": None},
            ConfigError,
            "--keep-best align is never computed with objective sft",
        ),
        (
            {"objective": "sft", "switch": False},
            ConfigError,
            "objective sft is evaluated by CE and exact match: leave it out",
        ),
        ({"teacher_mode": "live"}, ConfigError, "this one reads no teacher store: leave it out"),
        ({"profile": "zero3"}, ConfigError, "--eval-data goes with --profile ddp or fsdp"),
        ({"keep": 0}, ConfigError, "keep should be a whole number at least 1"),
        ({"trainer": {"eval_steps": 5}}, ConfigError, "trainer: eval_steps is refused: use --eval-data"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_first(options, change, error, message):
    with pytest.raises(error, match=message):
        train(replace(options, **change))
    assert not options.output.exists()


def test_a_store_of_another_teacher_or_other_samples_is_refused(options, cached, held, tmp_path):
    with pytest.raises(StoreMismatch, match="was made from 12 samples, .* has 8"):
        train(replace(options, eval_cache=cached / "stores"))
    other = tiny.checkpoint(tmp_path / "other", seed=5, width=32)
    given = {"data": held / "data.json", "images": held / "images", "template": "qa", "payload": "topk"}
    cache_teacher(CacheOptions(teacher=other, out=tmp_path / "o.zarr", **given))
    with pytest.raises(StoreMismatch, match="teacher projector: store"):
        train(replace(options, eval_cache=tmp_path / "o.zarr"))
    text_only = tiny.data(tmp_path / "text", tiny.rows(3, text_only=(0, 1, 2)))
    cache_teacher(CacheOptions(**{**given, "data": text_only, "teacher": options.teacher, "out": tmp_path / "t.zarr"}))
    with pytest.raises(ConfigError, match="no held-out sample of .* has an image, so VSD is never computed"):
        train(replace(options, eval_data=text_only, eval_cache=tmp_path / "t.zarr", keep_best="vsd"))
    changed = shutil.copytree(held, tmp_path / "changed")
    (changed / "data.json").write_text((held / "data.json").read_text().replace("red", "blue"))
    with pytest.raises(StoreMismatch, match="differs in .* samples? from what"):
        train(replace(options, eval_data=changed / "data.json"))
    assert not options.output.exists()


def test_evaluations_reach_log_plot_and_report(options, tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib", reason="plots need the extra viz")
    from matplotlib import pyplot

    caplog.set_level("INFO", logger="switchkd")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    train(options)
    said = caplog.text
    assert "held-out samples: 8 of 8, evaluated every 2 steps by CE, Align, VSD, and exact match of 9 answers" in said
    assert "held-out samples after step 4: loss " in said and "exact match 0." in said
    lines = {line.get_label(): line.get_xdata() for axes in drawn[-1].axes for line in axes.get_lines()}
    assert list(lines["ce, held out"]) == list(lines["vsd, held out"]) == [2, 4, 6]
    assert "Exact match, held out" in [axes.get_title() for axes in drawn[-1].axes]
    pytest.importorskip("jinja2", reason="a report needs the extra viz")
    found = report(ReportOptions(runs=((None, options.output),), out=tmp_path / "report"))
    names = {path.stem for path in found.pictures}
    assert {"eval-loss-ce", "eval-loss-align", "eval-loss-vsd", "eval-exact-match"} <= names
    assert not any("held-out" in line for line in found.missing)
