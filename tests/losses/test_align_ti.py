"""Align-TI's instruction-aware vision alignment: the term, the choice of the teacher's layer, and runs with it."""

import logging
import re
import shutil
from dataclasses import replace

import baseline_runs
import pytest
import reference
import tiny
import torch
import training
import yaml
from baseline_runs import by_hand, compare, history, normal, whole_file

from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses import baselines
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.live import instruction_focus as focus
from switchkd.pipelines.training.live.baseline_terms import make_extra_terms
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.train import train

cached, options, live = training.cached, training.options, baseline_runs.live
NAME = "align-ti-iva"


@pytest.mark.parametrize(
    ("tokens", "texts", "heads", "rows"),
    [(1, 1, 1, 2), (1, 0, 2, 3), (3, 1, 2, 47), (4, 0, 1, 5), (9, 4, 2, 15)],
)
def test_the_term_is_the_loop(tokens, texts, heads, rows):
    student, teacher = normal(tokens, rows).requires_grad_(), normal(tokens, rows, seed=1).requires_grad_()
    attention = normal(heads, texts, tokens + 2, seed=2).softmax(-1)[:, :, 1:-1]  # text takes a share
    weights = baselines.instruction_focus(attention)
    assert weights.tolist() == pytest.approx(reference.instruction_focus(attention), rel=1e-12)
    compare(
        baselines.iva_loss(student, teacher.detach(), weights),
        reference.iva(student, teacher.detach(), attention),
        student,
    )
    (of_teacher,) = torch.autograd.grad(baselines.iva_loss(student, teacher, weights), teacher, allow_unused=True)
    assert of_teacher is None or not of_teacher.any()


def test_the_term_vanishes_at_the_teacher_and_with_an_even_focus_is_the_visual_term_of_llava_kd():
    student, teacher = normal(6, 9), normal(6, 9, seed=1)
    attention = normal(2, 3, 6, seed=2).softmax(-1)
    assert baselines.iva_loss(teacher, teacher, baselines.instruction_focus(attention)) == 0
    even = baselines.instruction_focus(torch.full_like(attention, 0.1))
    torch.testing.assert_close(
        baselines.iva_loss(student, teacher, even), baselines.visual_kl(student, teacher), rtol=1e-12, atol=0
    )
    equal = torch.zeros(6, 9, dtype=torch.float64)
    assert baselines.iva_loss(equal, equal, even) == 0
    one = torch.zeros(1, 1, 6, dtype=torch.float64)
    one[..., 4] = 0.3  # of the instruction's attention, the rest goes to text
    torch.testing.assert_close(
        baselines.iva_loss(student, teacher, baselines.instruction_focus(one)),
        baselines.visual_kl(student[4:5], teacher[4:5]),
    )
    # A layer whose window does not reach back to the image.
    assert baselines.instruction_focus(torch.zeros(2, 3, 4)).tolist() == [0.25] * 4


@pytest.mark.parametrize(("layers", "pairs", "tokens"), [(1, 1, 1), (2, 1, 5), (3, 4, 7)])
def test_the_score_of_a_layer_is_the_loop(layers, pairs, tokens):
    first, second = (normal(layers, pairs, tokens, seed=seed).softmax(-1) for seed in (0, 1))
    first[0] = second[0]  # attends to the image in the same way whatever is asked
    found = baselines.instruction_relevance(first, second)
    expected = [
        reference.instruction_relevance(list(zip(a.tolist(), b.tolist(), strict=True)))
        for a, b in zip(first, second, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found[0] == pytest.approx(0, abs=1e-12)


def test_the_instruction_is_text_after_the_image_with_an_answer_to_come():
    image, pad = 2, 0
    ids = torch.tensor([[5, image, image, 6, 7, 8, 1, 9, 8, 1, 9, pad], [5, 6, image, image, 8, 1, *[pad] * 6]])
    labels = torch.full_like(ids, -100)
    labels[0, 5:7], labels[0, 8:10], labels[1, 4:6] = ids[0, 5:7], ids[0, 8:10], ids[1, 4:6]
    batch = Batch(ids, (ids != pad).long(), labels, torch.tensor([True, True]))
    found = focus.instruction_tokens(batch, ids == image)
    # Two turns, whose last token belongs to no turn; and an image directly before the answer.
    assert [row.nonzero().flatten().tolist() for row in found] == [[3, 4, 7], []]


def said_layer(caplog):
    """What a run said of the layer that it chose: (layer, of how many, highest score, lowest)."""
    text = next(record.getMessage() for record in caplog.records if NAME in record.getMessage())
    return re.search(r"layer (\d+) of (\d+) .*score, ([\d.]+) \(lowest ([\d.]+), .* (\d+) images?, two", text).groups()


def asked_after(batch, is_image):
    """The places of each sample's instruction, by hand: unsupervised text between its image and its last answer."""
    out = []
    for ids, label, there in zip(is_image, batch["labels"] != -100, batch["attention_mask"], strict=True):
        image, answer = (int(mask.nonzero().max()) if mask.any() else -1 for mask in (ids, label))
        out.append([j for j in range(image + 1, answer) if there[j] and not label[j]])
    return out


def test_a_run_trains_on_what_two_models_say_by_hand(live, cached, caplog):
    run = live(NAME, batch_size=12, steps=1)
    with caplog.at_level(logging.INFO):
        train(run)
    layer, depth, highest, lowest, images = said_layer(caplog)
    opened, batch = whole_file(run, cached)
    is_image = batch["input_ids"] == opened.image_token_id
    asked = asked_after(batch, is_image)
    shown = [i for i in range(12) if batch["has_image"][i]]
    # The layer: every image beside its own instruction and its neighbour's, in the order in which they are drawn.
    model = load_model(open_checkpoint(run.teacher))
    model.set_attn_implementation("eager")

    def focus_on(picture, question):
        row = slice(question, question + 1)
        with torch.no_grad():
            done = model(
                input_ids=batch["input_ids"][row],
                attention_mask=batch["attention_mask"][row],
                pixel_values=batch["pixel_values"][shown.index(picture)][None],
                output_attentions=True,
            )
        return [
            reference.instruction_focus(maps[0].double()[:, asked[question]][:, :, is_image[question]])
            for maps in done.attentions
        ]

    drawn = [i for i in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist() if i in shown]
    pairs = []
    for first in range(0, len(drawn), focus.SCORED_AT_ONCE):
        group = drawn[first : first + focus.SCORED_AT_ONCE]
        for picture, other in zip(group, group[1:] + group[:1], strict=True):
            words = [batch["input_ids"][i][asked[i]].tolist() for i in (picture, other)]
            if words[0] != words[1]:
                pairs.append((focus_on(picture, picture), focus_on(picture, other)))
    scores = [reference.instruction_relevance([(a[at], b[at]) for a, b in pairs]) for at in range(int(depth))]
    assert (int(images), int(depth)) == (len(pairs), 2)
    assert int(layer) == scores.index(max(scores))
    assert (float(highest), float(lowest)) == pytest.approx((max(scores), min(scores)), abs=6e-4)
    # The loss.
    (student, teacher), rows, _, _, _ = by_hand(run, cached)
    total = sum(
        float(
            reference.iva(
                student[0][i][is_image[i]].double(),
                teacher[0][i][is_image[i]].double(),
                teacher[3][int(layer)][i].double()[:, asked[i]][:, :, is_image[i]],
            )
        )
        for i in shown
    )
    logged = history(run.output)[0]
    assert logged["loss_iva"] == pytest.approx(total / len(shown), rel=1e-4)
    assert logged["loss_align"] == pytest.approx(
        float(reference.visual_kl(student[0][rows], teacher[0][rows])), rel=1e-4
    )
    assert logged["loss"] == pytest.approx(logged["loss_ce"] + logged["loss_align"] + logged["loss_iva"], rel=1e-4)
    # It has no adapter: the finished student has the student's tensors alone.
    assert training.weights(run.output).keys() == training.weights(run.student).keys()


def test_a_given_layer_is_taken(live, caplog):
    found = []
    for layer in (0, 1):
        run = live(NAME, batch_size=12, steps=1, attention_layer=layer)
        run = replace(run, output=run.output.with_name(f"layer-{layer}"))
        with caplog.at_level(logging.INFO):
            train(run)
        found.append(history(run.output)[0]["loss_iva"])
    assert found[0] != found[1]
    assert not any("instruction-relevance" in record.getMessage() for record in caplog.records)


def test_a_resumed_run_chooses_the_same_layer(live, tmp_path, monkeypatch):
    whole = live(NAME, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 5)
        with pytest.raises(training.Stop):
            train(live(NAME))
    record = live(NAME).output / "run.yaml"
    chosen = yaml.safe_load(record.read_text())["chosen_attention_layer"]
    assert chosen == yaml.safe_load((whole.output / "run.yaml").read_text())["chosen_attention_layer"]
    written = record.read_text()
    record.write_text(written.replace(f"chosen_attention_layer: {chosen}", f"chosen_attention_layer: {1 - chosen}"))
    shutil.copytree(live(NAME).output, tmp_path / "other")  # as if a machine that rounds otherwise had begun the run
    record.write_text(written)
    train(live(NAME))
    training.assert_same_weights(training.weights(live(NAME).output), training.weights(whole.output))
    other = live(NAME, output=tmp_path / "other")
    train(other)
    assert yaml.safe_load((other.output / "run.yaml").read_text())["chosen_attention_layer"] == 1 - chosen
    assert history(other.output)[-1]["loss_iva"] != history(whole.output)[-1]["loss_iva"]


def test_the_first_process_chooses_for_all(live, monkeypatch):
    """Whatever this process finds, the layer that arrives from the first one is trained with."""
    losses = []
    for layer in (0, 1):
        monkeypatch.setattr(focus, "from_first_process", lambda choose, layer=layer: layer)
        run = live(NAME, batch_size=12, steps=1)
        run = replace(run, output=run.output.with_name(f"sent-{layer}"))
        train(run)
        assert yaml.safe_load((run.output / "run.yaml").read_text())["chosen_attention_layer"] == layer
        losses.append(history(run.output)[0]["loss_iva"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (NAME, {"teacher_mode": "cached"}, "logits at visual tokens, weighted by attention, which no store holds"),
        (NAME, {"packing": 64}, "compares images sample by sample: leave --packing out"),
        (NAME, {"profile": "fsdp"}, "trains with --profile ddp only"),
        (NAME, {"attention_layer": 2}, "--attention-layer 2: the LLM of .* has layers 0 to 1"),
        ("compodistill", {"attention_layer": 0}, "--attention-layer belongs to objective align-ti-iva: leave it out"),
        ("sft", {"attention_layer": 0, "teacher_mode": "cached"}, "--attention-layer belongs to objective align-ti"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(live, name, change, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(live(name), **change))
    assert not live(name).output.exists()


@pytest.mark.parametrize("content", [tiny.rows(6), tiny.rows(4, text_only=(0, 1, 2)), tiny.rows(3, text_only=range(3))])
def test_one_instruction_alone_tells_no_layer(live, tmp_path, content):
    data = tiny.data(tmp_path / "same", content)
    run = live(NAME, data=data, images=data.parent / "images", batch_size=1)
    with pytest.raises(ConfigError, match="gave no two instructions to compare: name a layer, --attention-layer N"):
        train(run)
    train(replace(run, attention_layer=1, steps=1))  # the refused command left no record


def test_an_llm_without_attention_is_named(live):
    run = live(NAME)
    teacher, student = (load_model(open_checkpoint(path)) for path in (run.teacher, run.student))
    terms = make_extra_terms(NAME, student, LiveTeacher(teacher, 15), seed=0)
    for layer in teacher.model.language_model.layers:
        del layer.self_attn
    with pytest.raises(CheckpointError, match="has no self_attn in any layer"):
        terms.prepare([], lambda items: {}, torch.device("cpu"), {})
