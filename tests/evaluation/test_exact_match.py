"""Evaluation: greedy answers, exact match by type, resume, bad samples apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, DataError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.comparison import Baseline, compare, open_baseline
from switchkd.pipelines.evaluation.exact_match import evaluate, normalise
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.evaluation.options import EvalOptions


@pytest.fixture
def options(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(7, text_only=(2,), two_turns=(4,)))
    return EvalOptions(
        model=teacher,
        data=data,
        images=data.parent / "images",
        output=tmp_path / "out",
        template="qa",
        max_new_tokens=4,
        batch_size=3,
    )


def lines(options):
    return [json.loads(text) for text in (options.output / "predictions.jsonl").read_text().splitlines()]


def greedy(options, index, turn):
    """Decode by hand: one forward pass a token, no cache, no padding."""
    opened = open_checkpoint(options.model)
    encoder = SampleEncoder(opened, TEMPLATES["qa"], options.images, 128)
    ids, media = encoder.encode_prompt(SampleFile(options.data)[index], turn)
    model, ids, out = load_model(opened), torch.from_numpy(ids).long().unsqueeze(0), []
    for _ in range(options.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, **(media or {})).logits
        token = int(logits[0, -1].argmax())
        if token == 1:
            break
        out.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return encoder.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_predictions_are_greedy_whatever_the_batch(options):
    scores = evaluate(options)
    assert scores.questions == 8  # seven rows, one of them with two turns
    for line in lines(options):
        assert line["prediction"] == greedy(options, line["row"], line["turn"]), line


def test_a_checkpoints_generation_settings_do_not_change_greedy_answers(options, tmp_path):
    plain = {line["row"]: line["prediction"] for line in (evaluate(options), lines(options))[1]}
    shutil.copytree(options.model, tmp_path / "instruct")
    settings = {
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 5.0,
        "min_length": 9,
    }
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps(settings))
    other = replace(options, model=tmp_path / "instruct", output=tmp_path / "other")
    evaluate(other)
    assert {line["row"]: line["prediction"] for line in lines(other)} == plain


def test_accuracy_counts_exact_matches_by_type(options, monkeypatch):
    monkeypatch.setattr(SampleEncoder, "encode_prompt", lambda self, sample, turn: sample.index)
    monkeypatch.setattr(GreedyGenerator, "answer", lambda self, rows: ["green" if row % 2 else "Red." for row in rows])
    scores = evaluate(options)
    # Rows 0, 2, 4, 6 answer "red"; row 4's second turn asks for "a circle"; row 2 is text only and has no type.
    assert scores.accuracy == 4 / 8
    assert scores.by_type == {"color": 3 / 7}
    assert json.loads((options.output / "scores.json").read_text())["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("text", "expected"), [(" Yes. ", "yes"), ("a  Red\ncircle", "a red circle"), ("3.5", "3.5"), (".", "")]
)
def test_answers_are_compared_in_a_common_form(text, expected):
    assert normalise(text) == expected


def test_an_interrupted_evaluation_goes_on(options, monkeypatch):
    whole = replace(options, output=options.output.with_name("whole"))
    expected = evaluate(whole)
    evaluate(options)
    kept = (options.output / "predictions.jsonl").read_text().splitlines(keepends=True)
    (options.output / "predictions.jsonl").write_text("".join(kept[:4]) + kept[4][:20])
    asked = []
    original = SampleEncoder.encode_prompt
    monkeypatch.setattr(SampleEncoder, "encode_prompt", lambda self, *a: asked.append(a) or original(self, *a))
    scores = evaluate(options)
    assert len(asked) == 4
    assert (scores.accuracy, scores.questions) == (expected.accuracy, expected.questions)
    assert sorted(map(str, lines(options))) == sorted(map(str, lines(whole)))


def test_workers_prepare_the_same_prompts(options):
    (options.images / "001.png").write_bytes(b"no image")
    expected = evaluate(options)
    beside = replace(options, output=options.output.with_name("beside"), workers=2)
    assert evaluate(beside) == replace(expected, predictions=beside.output / "predictions.jsonl")
    assert expected.skipped == {"image_unreadable": 1}


def test_a_finished_evaluation_loads_no_model(options, monkeypatch):
    first = evaluate(options)
    monkeypatch.setattr("switchkd.pipelines.evaluation.exact_match.load_model", None)
    assert evaluate(options) == first


def test_another_model_in_the_same_output_is_refused(options, student):
    evaluate(options)
    with pytest.raises(ConfigError, match=r"begun with other options:\n  model: .*\n  weights: "):
        evaluate(replace(options, model=student))


def test_bad_samples_are_counted_apart(options):
    (options.images / "001.png").unlink()
    rows = json.loads(options.data.read_text())
    rows[3]["conversations"] = []
    options.data.write_text(json.dumps(rows))
    scores = evaluate(options)
    assert scores.skipped == {"image_missing": 1, "no_conversation": 1}
    assert scores.questions == 6


def test_a_sample_is_labelled_and_later_runs_ask_the_rest(options):
    part = evaluate(replace(options, limit=3))
    assert (part.questions, part.limited_to) == (3, 3)
    asked = {(line["row"], line["turn"]) for line in lines(options)}
    assert len(asked) == 3
    whole = evaluate(options)
    assert (whole.questions, whole.limited_to) == (8, None)
    assert len(lines(options)) == 8 and asked <= {(line["row"], line["turn"]) for line in lines(options)}
    again = evaluate(replace(options, limit=3))
    assert again == part
    assert json.loads((options.output / "scores.json").read_text())["limited_to"] == 3


def test_a_run_of_an_earlier_version_goes_on(options):
    evaluate(options)
    path = options.output / "run.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "limit" not in line))
    assert evaluate(replace(options, limit=2)).questions == 2


def answered(row, kind, correct, turn=0):
    return {"row": row, "turn": turn, "question_type": kind, "correct": correct}


def test_differences_from_another_model_are_paired():
    """Over the questions of both: with 30 gained and 10 lost of 100, the mean is 0.2 and its deviation sqrt(0.36) / 10."""
    ours = [answered(row, "color" if row % 2 else "shape", row < 60) for row in range(100)]
    theirs = {(row, 0): answered(row, "", 30 <= row < 70) for row in range(100)}
    theirs[100, 0] = answered(100, "", True)
    skipped = [{"row": 101, "turn": 0, "question_type": "color", "skipped": "image_missing"}]
    found = compare(ours + skipped, Baseline(Path("eval/other"), "OTHER", theirs))
    all_of_them = found.overall
    assert (all_of_them.questions, all_of_them.gained, all_of_them.lost) == (100, 30, 10)
    assert all_of_them.difference == pytest.approx(0.2)
    assert all_of_them.interval == pytest.approx((0.2 - 1.96 * 0.06, 0.2 + 1.96 * 0.06), abs=0.012)
    assert list(found.by_type) == ["color", "shape"]
    assert [found.by_type[kind].questions for kind in found.by_type] == [50, 50]
    assert sum(change.gained for change in found.by_type.values()) == 30


def test_a_baseline_is_compared_and_may_differ_when_resumed(options, student):
    other = replace(options, model=student, output=options.output.with_name("other"))
    theirs = evaluate(other)
    ours = evaluate(options)
    assert ours.baseline is None
    found = evaluate(replace(options, baseline=other.output)).baseline
    assert (found.model, found.overall.questions) == (str(student), 8)
    assert found.overall.difference == pytest.approx(ours.accuracy - theirs.accuracy)
    written = json.loads((options.output / "scores.json").read_text())["baseline"]
    assert written["overall"]["difference"] == found.overall.difference
    assert evaluate(options).baseline is None


def test_a_baseline_of_other_questions_is_refused_before_a_model_is_loaded(options, monkeypatch, tmp_path):
    evaluate(options)
    monkeypatch.setattr("switchkd.pipelines.evaluation.exact_match.load_model", None)
    data = tiny.data(tmp_path / "other", tiny.rows(5))
    other = replace(options, data=data, images=data.parent / "images", output=tmp_path / "new", baseline=options.output)
    with pytest.raises(DataError, match="answered the questions of another data file"):
        evaluate(other)
    for place in (tmp_path / "nowhere", options.model):
        with pytest.raises(DataError, match="is no output folder of `switchkd eval` with --data"):
            evaluate(replace(other, baseline=place))
    assert not other.output.exists()


def test_a_baseline_that_has_no_answer_in_common_is_told(options, monkeypatch):
    evaluate(options)
    begun = options.output.with_name("begun")
    shutil.copytree(options.output, begun)
    monkeypatch.setattr("switchkd.pipelines.evaluation.exact_match.load_model", None)
    for text in ("", "[1]\n", '{"row": 0, "turn": 0, "skipped": "image_missing"}\n'):
        (begun / "predictions.jsonl").write_text(text)
        with pytest.raises(DataError, match="has answered none of the questions"):
            evaluate(replace(options, baseline=begun))
    (begun / "predictions.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is no output folder"):
        evaluate(replace(options, baseline=begun))
    opened = open_baseline(options.output, SampleFile(options.data).fingerprint)
    with pytest.raises(DataError, match="has answered none of the questions"):
        compare([answered(99, "color", True)], opened)
    assert (options.output / "scores.json").exists()
