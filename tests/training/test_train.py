"""Stage two: the loss that is minimised, where the teacher's word comes from, what comes out."""

import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import training
from training import Stop, assert_same_weights, history
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from switchkd.errors import ConfigError
from switchkd.losses import dbild_loss
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


def test_all_three_parts_are_logged_and_the_student_moves(options, student):
    done = train(options)
    assert done.steps == 6
    first, last = history(options.output)[0], history(options.output)[-1]
    assert all(value > 0 for value in first[1:])
    assert last[1] < first[1]
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).state_dict() for f in (student, options.output))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part


def test_the_trained_student_opens_anywhere(options):
    train(options)
    for folder in (options.output, options.output / "checkpoint-6"):
        _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not set(report["missing_keys"]) - {"lm_head.weight"}
        assert not report["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 16
    opened = [
        LlavaForConditionalGeneration.from_pretrained(f) for f in (options.output, options.output / "checkpoint-6")
    ]
    assert_same_weights(opened[0].state_dict(), opened[1].state_dict())


@pytest.mark.parametrize("switch", (True, False))
def test_training_from_hidden_states_equals_the_live_teacher(options, hidden, tmp_path, switch):
    common = replace(options, steps=20, save_every=100, switch=switch)
    train(replace(common, cache=hidden))
    live = replace(common, cache=None, teacher_mode="live", template="qa", output=tmp_path / "live")
    train(live)
    for a, b in zip(history(options.output), history(live.output), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)  # states are stored in float16


def test_align_is_the_distance_to_the_live_teacher(options, student, teacher, cached):
    """The first logged Align of the cached run equals DBiLD against the teacher run live (k covers this vocabulary)."""
    from switchkd.data.encoded import collate
    from switchkd.data.encoding import SampleEncoder
    from switchkd.data.samples import SampleFile
    from switchkd.data.templates import TEMPLATES
    from switchkd.models.checkpoint import open_checkpoint
    from switchkd.models.vlm import load_model
    from switchkd.positions import predicting_rows

    train(replace(options, steps=1, batch_size=12))
    opened = open_checkpoint(student)
    encoder = SampleEncoder(opened, TEMPLATES["qa"], cached / "images", 128)
    batch = collate([encoder.encode(sample) for sample in SampleFile(cached / "data.json")], 0)
    rows, _ = predicting_rows(batch.pop("labels")), batch.pop("has_image")
    with torch.no_grad():
        of_student, of_teacher = (load_model(open_checkpoint(c))(**batch).logits[rows] for c in (student, teacher))
    expected = dbild_loss(of_student, of_teacher).item()
    assert history(options.output)[0][2] == pytest.approx(expected, rel=1e-2)


def test_a_student_with_the_teachers_own_eyes_is_told_so(options, teacher, tmp_path, caplog):
    own = LlavaForConditionalGeneration.from_pretrained(options.student)
    whole = LlavaForConditionalGeneration.from_pretrained(teacher)
    own.model.vision_tower.load_state_dict(whole.model.vision_tower.state_dict())
    folder = shutil.copytree(options.student, tmp_path / "eyes")
    own.save_pretrained(folder)
    with caplog.at_level("WARNING", logger="switchkd"):
        train(replace(options, steps=1))
        assert "VSD is" not in caplog.text
        # Every logit is in this store, in steps of 1/4096: the distance to it is rounding, squared.
        train(replace(options, steps=1, student=folder, output=tmp_path / "eyes-run"))
    assert caplog.text.count("the student sees as the teacher does") == 1


def test_samples_are_encoded_within_the_bounds_of_the_store(options, cached, tmp_path, monkeypatch):
    made = CacheOptions(
        teacher=options.teacher,
        data=options.data,
        images=options.images,
        out=tmp_path / "s.zarr",
        template="qa",
        max_length=77,
        max_image_pixels=1 << 30,
    )
    cache_teacher(made)
    used = []

    def stop(samples, encoder, *_):
        used.append((encoder.template.name, encoder.max_length, encoder.max_image_pixels))
        raise Stop

    monkeypatch.setattr("switchkd.pipelines.training.joining.TrainingSamples", stop)
    with pytest.raises(Stop):
        train(replace(options, cache=made.out))
    assert used == [("qa", 77, 1 << 30)]


@pytest.mark.parametrize(
    ("chosen", "precision", "expected"),
    [("auto", "float32", "float32"), ("auto", "bfloat16", "bfloat16"), ("float32", "bfloat16", "float32")],
)
def test_the_teachers_dtype_follows_the_precision(options, monkeypatch, chosen, precision, expected):
    from switchkd.pipelines.training import model_setup

    load, dtypes = model_setup.load_model, []
    monkeypatch.setattr(
        model_setup, "load_model", lambda *a, **named: dtypes.append(named["dtype"]) or load(*a, **named)
    )
    train(replace(options, steps=1, teacher_dtype=chosen, precision=precision, teacher_checkpointing=True))
    assert dtypes == ["float32", expected]  # student, teacher
    assert all(value > 0 for value in history(options.output)[0][1:])


def test_sft_needs_no_teacher_and_skips_bad_samples(options, tmp_path):
    rows = tiny.rows(8)
    rows[2]["image"] = "nowhere.png"
    data = tiny.data(tmp_path / "sft", rows, images=False)
    for i in range(8):
        tiny.image(data.parent / f"images/{i:03d}.png", i)
    done = train(
        replace(
            options,
            objective="sft",
            switch=False,
            teacher=None,
            cache=None,
            template="qa",
            data=data,
            images=data.parent / "images",
        )
    )
    assert (done.samples, done.skipped) == (7, {"image_missing": 1})
    assert all(entry[2:] == [0, 0] for entry in history(options.output))


def test_align_alone_needs_no_teacher_weights(options):
    train(replace(options, switch=False, teacher=None))
    assert all(entry[2] > 0 and entry[3] == 0 for entry in history(options.output))


@pytest.mark.parametrize("objective", ("fkl", "rkl", "bild-fkl", "bild-rkl", "dbild-fkl"))
def test_every_objective_trains_with_the_switch(options, objective):
    train(replace(options, objective=objective, steps=2))
    assert all(value > 0 for entry in history(options.output) for value in entry[1:])


def test_an_environment_that_only_caches_is_refused(options, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    with pytest.raises(ConfigError, match=r"training needs transformers 5\.22 or newer, found 5\.19\.0"):
        train(options)
    assert not options.output.exists()
