"""`switchkd report`: everything that runs hold is on the page, nothing else is, and no text of a data file can do anything."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import report_runs
import yaml
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="reports need the extra `viz`")
pytest.importorskip("jinja2", reason="reports need the extra `viz`")

from switchkd.cli.main import main
from switchkd.errors import DataError
from switchkd.losses import kneedle
from switchkd.pipelines.evaluation.benchmarks.registry import AVERAGES
from switchkd.pipelines.reporting.inputs import find_inputs
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.report import report
from switchkd.pipelines.reporting.scores import COMPETENCIES
from switchkd.pipelines.reporting.student_knees import knees_beside
from switchkd.stores import TeacherStore


@pytest.fixture(scope="module")
def runs(finished_runs):
    return finished_runs


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The report on everything, as text."""
    out = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(main, ["report", str(runs), "--out", str(out), "--knees", "6", "--samples", "9"])
    assert done.exit_code == 0, done.output
    return (out / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects elements and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data}"


def write(places, out, **options):
    done = report(ReportOptions([(None, place) for place in places], out, **options))
    return done, done.page.read_text(encoding="utf-8")


def test_everything_that_the_runs_hold_is_there(page, runs):
    titles = re.findall(r'aria-label="([^"]+)"', page)
    assert {"CE, nats per position", "Align, nats per position", "VSD, nats per position", "Learning rate"} <= set(
        titles
    )
    assert {"Speed", "Time spent waiting for data", "Gradient norm"} <= set(titles)
    assert {
        "Gradient of the switch pathway in the vision features",
        "Mean knee of switch-kd and its teacher, by step",
    } <= set(titles)
    assert {"Knee of the teacher, t.zarr", "Probability outside the top 4, t.zarr", "Size of the parts, t.zarr"} <= set(
        titles
    )
    assert {"Knees of sft and its teacher", "Knees of switch-kd and its teacher"} <= set(titles)
    text = Reader(page).text
    for name in ("teacher", "sft", "switch-kd"):
        accuracy = json.loads((runs / f"eval/{name}/scores.json").read_text())["accuracy"]
        assert f"{accuracy:.4f}" in text
    assert "dbild-rkl + switch" in text
    assert yaml.safe_load((runs / "runs/switch-kd/run.yaml").read_text())["teacher_signal"] in text


def test_the_curves_are_the_history(page, runs):
    """A matplotlib line is a path with one vertex for every logged step."""
    history = json.loads((runs / "runs/switch-kd/summary.json").read_text())["history"]
    logged = [entry for entry in history if "loss_vsd" in entry]
    svg = re.search(r'<svg[^>]*aria-label="VSD, nats per position".*?</svg>', page, re.DOTALL)[0]
    curve = re.search(r'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*var\(--s1\)', svg)[1]
    vertices = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", curve), dtype=float)
    assert len(vertices) == len(logged) == 4
    drawn, values = -vertices[:, 1], np.array([entry["loss_vsd"] for entry in logged])
    assert np.allclose(np.ptp(values) * (drawn - drawn.min()), np.ptp(drawn) * (values - values.min()), atol=1e-3)


def test_the_page_needs_nothing_else_and_forbids_scripts(page):
    reader = Reader(page)
    assert not [tag for tag, _ in reader.elements if tag in ("script", "link", "iframe", "object")]
    for _, attributes in reader.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/", "#")), value
    assert "url(http" not in page
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in reader.elements
    ]


def test_text_of_the_data_is_only_text(page):
    text = Reader(page).text
    assert report_runs.ATTACK in text  # the question as it stands in the data file, {{ 7 * 7 }} unread
    assert "<script" not in page and "&lt;script&gt;" in page


def test_samples_show_image_question_and_every_answer(page, runs):
    lines = {
        name: {
            (line["row"], line["turn"]): line
            for line in map(json.loads, (runs / f"eval/{name}/predictions.jsonl").read_text().splitlines())
        }
        for name in ("teacher", "sft", "switch-kd")
    }
    cards = re.findall(r'<article class="sample">.*?</article>', page, re.DOTALL)
    assert len(cards) == 9
    for card in cards:
        text = " ".join(Reader(card).text.split())
        row = int(re.search(r"row (\d+)", text)[1])
        assert ("<img" in card) == (row != 1)  # row 1 has no image
        for name in lines:
            answers = [line["prediction"] for key, line in lines[name].items() if key[0] == row]
            assert any(" ".join(f"{name} {answer}".split()) in text for answer in answers)


def test_questions_on_which_the_models_differ_come_first(runs, tmp_path):
    shutil.copytree(runs / "eval/sft", tmp_path / "eval/sft")
    copy = shutil.copytree(runs / "eval/sft", tmp_path / "eval/other")
    text = (copy / "predictions.jsonl").read_text().splitlines()
    changed = json.loads(text[5])
    text[5] = json.dumps(changed | {"prediction": "something else"})
    (copy / "predictions.jsonl").write_text("\n".join(text))
    _, page = write([tmp_path], tmp_path / "out", samples=1)
    assert "1 of 9 questions, evenly spaced over the 1 on which" in Reader(page).text
    (card,) = re.findall(r'<article class="sample">.*?</article>', page, re.DOTALL)
    assert "something else" in card and f"row {changed['row']}" in card


def test_what_is_not_there_is_left_out_and_said(runs, tmp_path):
    done, page = write([runs / "runs/sft"], tmp_path / "out")
    text = Reader(page).text
    for words in (
        "No store was given",
        "No evaluation was given",
        "No run has VSD: train with a teacher to have Align",
        "No run has “Gradient of the switch pathway in the vision features”",
        "No question was answered by every evaluation",
    ):
        assert words in text
        assert any(words in line for line in done.missing)
    assert "loss-vsd" not in {path.stem for path in done.pictures}
    assert "Knee" not in page


def test_the_pngs_are_the_pictures_of_the_page(runs, tmp_path):
    done, page = write([runs / "stores"], tmp_path / "out")
    assert len(done.pictures) == page.count("<svg") == 3
    for path in done.pictures:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    assert write([runs / "stores"], tmp_path / "a")[1] == write([runs / "stores"], tmp_path / "b")[1]


def test_an_unfinished_run_is_reported_from_its_last_checkpoint(runs, tmp_path):
    copy = shutil.copytree(runs / "runs/sft", tmp_path / "sft")
    (copy / "summary.json").unlink()
    assert "4, not finished" in Reader(write([copy], tmp_path / "out")[1]).text


def test_an_unfinished_store_is_reported(runs, tmp_path):
    copy = shutil.copytree(runs / "stores/t.zarr", tmp_path / "t.zarr")
    for part in (copy / "parts").glob("0*"):
        shutil.rmtree(part)
    assert "t.zarr has no position yet" in Reader(write([copy], tmp_path / "out")[1]).text


def test_knees_of_the_student_are_those_of_its_logits(runs):
    """Against a plain forward pass over each sample, and the store's own statistics."""
    import torch

    from switchkd.data.encoding import SampleEncoder
    from switchkd.data.load_template import template_from_dict
    from switchkd.data.samples import SampleFile
    from switchkd.models.checkpoint import open_checkpoint
    from switchkd.models.vlm import load_model
    from switchkd.positions import predicting_rows

    store = TeacherStore.open(runs / "stores/t.zarr")
    (run,) = find_inputs([(None, runs / "runs/switch-kd")]).trains
    data = SampleFile(runs / "data/data.json"), runs / "data/images"
    of_student, of_teacher = knees_beside(run, store, data, samples=100, device="cpu")
    checkpoint = open_checkpoint(run.path)
    model = load_model(checkpoint, dtype="float32")
    encoder = SampleEncoder(checkpoint, template_from_dict(store.manifest.template), runs / "data/images", 2048)
    expected, stored = [], []
    for index, sample in enumerate(SampleFile(runs / "data/data.json")):
        encoded = encoder.encode(sample)
        ids = torch.from_numpy(encoded.input_ids).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(encoded.supervised)[None], -100)
        pixels = None if encoded.media is None else encoded.media["pixel_values"]
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits[predicting_rows(labels)]
        expected += kneedle(logits[:, : store.manifest.vocab_rows]).tolist()
        stored += store[index].payload.stat("knee").tolist()
    assert of_student.tolist() == expected
    assert of_teacher.tolist() == stored


SCORES = [50.0, 60.0, 70.0, 80.0, 60.0, 40.0, 20.0, 55.0, 45.0, 90.0]


def test_a_run_whose_data_are_gone_costs_its_own_knees_only(runs, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    record = tmp_path / "runs/sft/run.yaml"
    record.write_text(record.read_text().replace(str(runs / "data/images"), "/nowhere"))
    done, _ = write([tmp_path, runs / "stores"], tmp_path / "out", knees=2)
    assert any("The knees of sft are left out: " in line and "/nowhere" in line for line in done.missing)
    assert [path.stem for path in done.pictures if path.stem.startswith("knees-student")] == ["knees-student-0"]


def test_the_benchmark_table_and_the_radar(tmp_path):
    report_runs.benchmarks(tmp_path / "ours", SCORES)
    report_runs.benchmarks(tmp_path / "theirs", [score - 10 for score in SCORES])
    done, page = write([tmp_path], tmp_path / "out")
    text = Reader(page).text
    assert "50.0 (49.0 … 51.0)" in text and "Avg10" in text
    svg = re.search(r'<svg[^>]*aria-label="Five competencies, mean score in percent".*?</svg>', page, re.DOTALL)[0]
    for word in ("Perception &amp;", "Cognition &amp;", "OCR", "Domain-specific", "Hallucination", "ours", "theirs"):
        assert word in svg
    # means: (50 + 60 + 70) / 3, (80 + 60 + 40 + 20) / 4, 55, 45, 90: the radii of the first polygon above a centre of 30
    path = re.search(r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: var\(--s0\)', svg)[1]
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), dtype=float)[:5]
    spokes = [np.pi / 2 - 2 * np.pi * i / 5 for i in range(5)]
    unit = np.array([[np.cos(a), -np.sin(a)] for a in spokes])
    radii = np.array([60, 50, 55, 45, 90]) - 30.0
    fit, residual, *_ = np.linalg.lstsq(
        np.vstack([np.hstack([(radii * unit[:, i])[:, None], np.eye(2)[[i] * 5]]) for i in (0, 1)]),
        np.concatenate([points[:, 0], points[:, 1]]),
        rcond=None,
    )
    assert fit[0] > 0 and float(residual[0]) < 1e-3
    assert "answer of ours" in text and "the image cannot be shown" in text
    assert "radar" in {path.stem for path in done.pictures}


def test_a_radar_needs_all_ten(tmp_path):
    report_runs.benchmarks(tmp_path / "ours", [*SCORES[:9], None])
    done, page = write([tmp_path / "ours"], tmp_path / "out")
    assert "<svg" not in page
    assert any("needs scores on all ten" in line for line in done.missing)


def test_the_competencies_are_the_papers_ten():
    names = [name for group in COMPETENCIES.values() for name in group]
    assert sorted(names) == sorted(AVERAGES["avg10"])


def test_labels_tell_runs_apart(runs, tmp_path):
    for place in ("a/runs/sft", "b/runs/sft"):
        shutil.copytree(runs / "runs/sft", tmp_path / place)
    assert [run.label for run in find_inputs([(None, tmp_path)]).trains] == ["a/runs/sft", "b/runs/sft"]
    named = find_inputs([("mine", tmp_path / "a"), (None, tmp_path / "b")])
    assert [run.label for run in named.trains] == ["mine", "sft"]
    one = tmp_path / "a/runs/sft"
    again = find_inputs([("mine", one), ("yours", one), (None, one)])
    assert [run.label for run in again.trains] == ["mine", "yours", "sft"]  # a label makes no other name longer
    both = find_inputs([(None, runs)])
    assert both.series == {"sft": 0, "switch-kd": 1, "teacher": 2}  # a run and its evaluation share a colour


def test_a_label_is_given_on_the_command_line(runs, tmp_path):
    words = ["report", f"<b>x=y</b>={runs}/runs/sft", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, words).exit_code == 2  # the label ends at the first "="
    words[1] = f"<b>${{x}}={runs}/runs/sft"
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "<b>${x}" in Reader((tmp_path / "out/report.html").read_text()).text


def test_nothing_to_report_on(tmp_path, teacher):
    with pytest.raises(DataError, match="holds no training run"):
        find_inputs([(None, teacher)])
    done = CliRunner().invoke(main, ["report", str(tmp_path / "nowhere")])
    assert done.exit_code == 2 and "holds no training run" in done.output and "Traceback" not in done.output


def test_damaged_files_are_named(runs, tmp_path):
    copy = shutil.copytree(runs / "eval/sft", tmp_path / "sft")
    (copy / "scores.json").write_text("{")
    with pytest.raises(DataError, match=r"scores\.json cannot be read"):
        find_inputs([(None, copy)])
