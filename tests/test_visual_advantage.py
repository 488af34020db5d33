"""The visual advantage: log-probabilities against loops, a model that looks and one that does not, and what is warned about."""

import json
import math
from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.data.encoding import SampleEncoder
from switchkd.data.images import blurred
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError
from switchkd.losses.lm_head import LMHead
from switchkd.losses.signals import HiddenSignal, SparseSignal
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.components import lm_head_of
from switchkd.models.vlm import load_model
from switchkd.pipelines.capture.audit import audit
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.pipelines.visual_advantage import (
    FEWEST,
    Advantage,
    Measured,
    VisualAdvantage,
    blurred_encoder,
    lines_of,
    log_probs_of_signal,
    log_probs_of_states,
    measure,
    summarise,
)
from switchkd.stores import TeacherStore


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    """Images that are checkered or grey, which the answer tells and a blur hides, and a teacher that learned to see it."""
    folder = tmp_path_factory.mktemp("patterns")
    (folder / "images").mkdir()
    rows = []
    for number in range(40):
        checkered, kind = number % 2 == 0, ("pattern", "never")[number % 5 == 4]
        board = np.indices((16, 16)).sum(0)[..., None].repeat(3, -1) % 2 * 255
        pixels = board if checkered else np.full_like(board, 127)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{number}.png")
        answer = "green" if kind == "never" else ("red" if checkered else "blue")
        question = "what color" if kind == "never" else "what is it ?"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "question_type": kind, "conversations": turns})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]})
    (folder / "data.json").write_text(json.dumps(rows))
    train(
        TrainOptions(
            student=teacher, data=folder / "data.json", images=folder / "images", output=folder / "teacher", objective="sft",
            switch=False, template="qa", steps=120, batch_size=20, lr=3e-3, log_every=60, save_every=500,
        )
    )  # fmt: skip
    return folder


def encoder_of(folder, checkpoint):
    return SampleEncoder(open_checkpoint(checkpoint), TEMPLATES["qa"], folder / "images", 128)


def by_loop(logits, wanted):
    """log p of each wanted token, token by token in float64."""
    out = []
    for row, token in zip(logits.double().tolist(), wanted.tolist(), strict=True):
        largest = max(row)
        out.append(row[token] - largest - math.log(sum(math.exp(value - largest) for value in row)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("positions", (0, 1, 700))
def test_log_probs_are_the_loops(positions):
    generator = torch.Generator().manual_seed(1)
    states, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (positions, 7))
    wanted = torch.randint(7, (positions,), generator=generator)
    expected = by_loop(states @ weight.T, wanted)
    torch.testing.assert_close(log_probs_of_states(states, LMHead(weight), wanted), expected)
    torch.testing.assert_close(log_probs_of_signal(HiddenSignal(states, weight), wanted), expected)


def test_a_sparse_signal_knows_the_tokens_that_it_keeps():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ordered, ids = logits.sort(descending=True)
    tail = ordered[:, 4:].logsumexp(-1)
    signal = SparseSignal(ids[:, :4], ordered[:, :4], tail, torch.full((5,), 3), 9)
    wanted = torch.stack([ids[0, 0], ids[1, 3], ids[2, 4], ids[3, 8], ids[4, 1]])
    found, expected = log_probs_of_signal(signal, wanted), by_loop(logits, wanted)
    torch.testing.assert_close(found[[0, 1, 4]], expected[[0, 1, 4]])
    assert found[[2, 3]].isnan().all()


def test_blurring_keeps_size_text_and_digest(place):
    encoder = encoder_of(place, place / "teacher")
    sample = SampleFile(place / "data.json")[0]
    sharp, soft = encoder.encode(sample), blurred_encoder(encoder).encode(sample)
    assert sharp.input_ids.tolist() == soft.input_ids.tolist() and sharp.digest == soft.digest
    assert not torch.equal(sharp.media["pixel_values"], soft.media["pixel_values"])
    torch.testing.assert_close(
        encoder.encode(sample).media["pixel_values"], sharp.media["pixel_values"]
    )  # not of the cache
    image = Image.effect_noise((40, 20), 80).convert("RGB")
    assert blurred(image, 0.0) is image
    soft = blurred(image, 1 / 16)
    assert soft.size == image.size and np.asarray(soft).std() < np.asarray(image).std() / 2


def test_a_measurement_is_the_models_own_forward(place):
    """Sharp and blurred, from transformers' own logits; the text-only row is left out."""
    encoder, samples = encoder_of(place, place / "teacher"), list(SampleFile(place / "data.json"))
    checkpoint = open_checkpoint(place / "teacher")
    model = load_model(checkpoint)
    found = measure(model, lm_head_of(model).rows(checkpoint.vocab_rows), encoder, samples[-6:], 0, batch_size=4)
    assert len(found.kinds) == 5 and set(found.kinds) == {"pattern", "never"}
    plain = LlavaForConditionalGeneration.from_pretrained(place / "teacher")
    for each, values in ((encoder, found.sharp), (blurred_encoder(encoder), found.blurred)):
        expected = []
        for sample in samples[-6:-1]:
            encoded = each.encode(sample)
            ids = torch.from_numpy(encoded.input_ids).long()[None]
            with torch.no_grad():
                logits = plain(input_ids=ids, pixel_values=encoded.media["pixel_values"]).logits[0, :-1]
            keep = torch.from_numpy(encoded.supervised[1:])
            expected.append(by_loop(logits[keep][:, : checkpoint.vocab_rows], ids[0, 1:][keep]))
        torch.testing.assert_close(values, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert sum(found.positions) == len(found.sharp)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "internvl"))
def test_other_families_are_measured_too(family, tmp_path):
    folder = families.write_checkpoint(family, tmp_path / "model", 0)
    data = tiny.data(tmp_path / "data", tiny.rows(3))
    checkpoint = open_checkpoint(folder)
    encoder = SampleEncoder(checkpoint, TEMPLATES["qa"], data.parent / "images", 2048)
    model = load_model(checkpoint)
    found = measure(model, lm_head_of(model).rows(checkpoint.vocab_rows), encoder, list(SampleFile(data)), 0, 2)
    assert len(found.sharp) == len(found.blurred) == sum(found.positions)
    assert not torch.equal(found.sharp, found.blurred)


def check(place, model, **changed):
    given = {
        "data": place / "data.json",
        "images": place / "images",
        "model": model,
        "template": "qa",
        "visual_advantage": 41,
    }
    return check_data(CheckOptions(**given | changed)).looking


def test_a_model_that_looks_and_one_that_does_not(place, teacher):
    looks, blind = check(place, place / "teacher"), check(place, teacher)
    assert looks.every.samples == 40
    assert looks.by_kind["pattern"].mean > 0.5 and looks.by_kind["pattern"].is_clear
    assert abs(looks.by_kind["never"].mean) < 0.1  # its answer is that of the question
    assert looks.warnings == []
    assert blind.every.mean < 0.05 and len(blind.warnings) == 1
    assert "does not look" in blind.warnings[0] and "over 40 samples" in blind.warnings[0]
    with pytest.raises(ConfigError, match="pass --model and --images"):
        check(place, None)


def test_the_command_prints_a_line_for_each_kind(place, teacher):
    words = [
        "data",
        "check",
        str(place / "data.json"),
        "--images",
        str(place / "images"),
        "--model",
        str(place / "teacher"),
    ]
    done = CliRunner().invoke(main, [*words, "--template", "qa", "--visual-advantage", "41", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.split("visual advantage:")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["kind", "never", "pattern", "all"]
    done = CliRunner().invoke(main, [*words, "--template", "qa"])
    assert "visual advantage" not in done.stdout


@pytest.fixture(scope="module")
def store(place):
    given = {"teacher": place / "teacher", "data": place / "data.json", "images": place / "images", "template": "qa"}
    cache_teacher(CacheOptions(out=place / "s.zarr", payload="both", k=2, part_size=20, **given))
    cache_teacher(CacheOptions(out=place / "topk.zarr", payload="topk", k=2, part_size=20, **given))
    return place


@pytest.mark.parametrize("name", ("s.zarr", "topk.zarr"))
def test_an_audit_tells_that_the_teacher_looks_and_the_store_agrees(store, name):
    options = AuditOptions(store / name, store / "teacher", store / "data.json", store / "images", samples=41)
    found = audit(options).looking
    assert found.every.samples == 40 and found.warnings == []
    assert found.stored.mean == pytest.approx(found.every.mean, abs=0.02)
    assert found.stored_error is None
    assert audit(replace(options, visual_advantage=False)).looking is None


def test_stored_visual_advantages_are_compared(store, monkeypatch):
    """Those of the right images agree to the store's float16; those of the rows before tell nothing, and the audit says so."""
    given = {"teacher": store / "teacher", "data": store / "data.json", "images": store / "images"}
    out = store / "looks.zarr"
    cache_teacher(CacheOptions(out=out, part_size=20, template="qa", visual_advantage=True, **given))
    options = AuditOptions(out, samples=41, **given)
    found = audit(options).looking
    assert 0 < found.stored_error < 0.002 and found.explained > 0.9999 and found.warnings == []
    assert "the store's visual advantages are 0.00" in "\n".join(lines_of(found))
    original = TeacherStore.payload

    def half_astray(values):
        return np.where(np.arange(len(values)) < len(values) / 2, np.roll(values, 2), values)

    for change in (lambda values: np.roll(values, 2), np.zeros_like, lambda values: values * 0 + 3, half_astray):

        def stray(self, indices, change=change):
            payload = original(self, indices)
            return replace(payload, visual_advantage=change(payload.visual_advantage))

        monkeypatch.setattr(TeacherStore, "payload", stray)
        (warning,) = audit(options).looking.warnings
        assert "some belong to other images. Cache again, or train without --weight-by visual-advantage" in warning


def test_the_share_of_the_variance_that_stored_advantages_explain():
    """R², by its definition; where nothing varies, 1 for the same values and 0 for others."""
    gains = np.random.default_rng(1).exponential(size=40)
    measured = Measured(["a"] * 20, [2] * 20, torch.from_numpy(gains), torch.zeros(40, dtype=torch.float64))
    for stored in (gains, gains + 0.01, np.zeros(40), gains[::-1].copy()):
        found = summarise(measured, None, torch.from_numpy(stored)).explained
        assert found == pytest.approx(1 - ((stored - gains) ** 2).mean() / gains.var())
    same = Measured(["a"], [2], torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert [summarise(same, None, torch.full((2,), v, dtype=torch.float64)).explained for v in (1.0, 0.5)] == [1.0, 0.0]


def test_a_capture_whose_images_went_astray_is_named(store, monkeypatch):
    """The states of every sample are those of a blurred image: digests are right, and what was stored is not."""
    from switchkd.pipelines.capture import audit as module

    original = module.StoredHidden.signal

    def stray(self, batch):
        rows = torch.arange(len(batch.teacher_hidden)).roll(2)  # of the sample before, as if images were one row off
        object.__setattr__(batch, "teacher_hidden", batch.teacher_hidden[rows])
        return original(self, batch)

    monkeypatch.setattr(module.StoredHidden, "signal", stray)
    options = AuditOptions(store / "s.zarr", store / "teacher", store / "data.json", store / "images", samples=41)
    report = audit(options)
    assert [text.split(":")[0] for text in report.looking.warnings] == ["the images of this capture went astray"]
    assert "all, as stored" in "\n".join(lines_of(report.looking))


def of(gain, samples=20):
    rest = np.full(samples, -1.0)
    return Advantage.of(rest + np.asarray(gain), rest)


def test_what_counts_as_looking():
    noise = np.random.default_rng(0).normal(0, 1, 20)
    noise -= noise.mean()
    assert not of(noise).is_clear and not of(np.zeros(20)).is_clear and not of(np.full(20, -1.0)).is_clear
    assert of(noise + 2).is_clear
    assert of([0.1] * 17 + [40.0, -1.0, -1.0]).is_clear  # by sign: its mean is that of one sample
    assert of([0.5], samples=1).error == 0.0


def test_warnings_need_enough_samples_and_name_kinds():
    sees, blind = of(np.full(FEWEST, 1.0), FEWEST), of(np.zeros(FEWEST), FEWEST)
    both = VisualAdvantage(sees, {"a": sees, "b": blind})
    assert both.warnings == ["the teacher does not look where it answers questions of these kinds: b"]
    few = of(np.zeros(FEWEST - 1), FEWEST - 1)
    assert VisualAdvantage(few, {"a": few}).warnings == []
    assert VisualAdvantage(sees, {"a": sees, "b": few}).warnings == []
    nothing = summarise(Measured([], [], torch.zeros(0), torch.zeros(0)))
    assert nothing.every is None and lines_of(nothing) == ["visual advantage: no sample has an image"]
