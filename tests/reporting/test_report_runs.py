"""What the report says of a run: its settings, held-out samples, differences from a baseline, knees for a chosen store."""

import json
import re
import shutil

import numpy as np
import pytest
import report_runs
import yaml
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="reports need the extra `viz`")
pytest.importorskip("jinja2", reason="reports need the extra `viz`")
pytest.importorskip("peft", reason="a run with LoRA needs the extra `lora`")

from switchkd.cli.main import main
from switchkd.pipelines.options import fields_of
from switchkd.pipelines.reporting.differences import add_differences
from switchkd.pipelines.reporting.inputs import find_inputs
from switchkd.pipelines.reporting.page import Section
from switchkd.pipelines.reporting.run_settings import DECIDED, TOLD, settings_of, settings_table
from switchkd.pipelines.training.options import TrainOptions


@pytest.fixture(scope="module")
def page(finished_runs, later_runs, tmp_path_factory):
    """The report on runs of every kind with three stores, and what the command prints."""
    out = tmp_path_factory.mktemp("report")
    places = [finished_runs, later_runs]
    words = ["report", *map(str, places), "--out", str(out), "--knees", "4", "--baseline", "sft"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return (out / "report.html").read_text(encoding="utf-8"), done.output


@pytest.fixture(scope="module")
def inputs(finished_runs, later_runs):
    return find_inputs([(None, finished_runs), (None, later_runs)])


def rows_of(table):
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def test_payload_store_and_objective_of_every_run(inputs):
    rows = rows_of(settings_table(inputs.trains, inputs.stores))
    assert rows["switch-kd"]["objective"] == "dbild-rkl + switch" and rows["sft"]["objective"] == "sft"
    assert rows["switch-kd"]["teacher's signal"].startswith("hidden: 32 wide states")
    assert {name: row["store"] for name, row in rows.items()} == {
        "sft": "", "switch-kd": "t.zarr", "lora": "t.zarr", "live": "", "mixture": "a.zarr, b.zarr",
    }  # fmt: skip
    assert rows["live"]["teacher's signal"] == "live teacher"
    assert rows["lora"]["trains"] == ("vision, projector, language; LoRA of rank 4, alpha 8, dropout 0, in language")
    assert rows["mixture"]["data"].endswith("mixture.yaml, a mixture of 2 data files")
    assert rows["lora"]["held-out samples"].endswith("best kept by loss") and not rows["sft"]["held-out samples"]


def test_a_store_that_was_not_given_is_named_by_its_place(finished_runs):
    found = find_inputs([(None, finished_runs / "runs/switch-kd")])
    assert rows_of(settings_table(found.trains, []))["switch-kd"]["store"] == str(finished_runs / "stores")


def test_every_option_is_either_changed_or_left_at_its_default(inputs):
    """Against the record and the defaults that the class itself has."""
    for run in inputs.trains:
        lists = settings_of(run).lists
        changed, left = lists["Other than the default"], lists["Left at the default"]
        required = {"student", "data", "output"}
        assert changed.keys() | left.keys() == fields_of(TrainOptions).keys() - TOLD
        assert not changed.keys() & left.keys() and required <= TOLD
        defaults = TrainOptions(student="s", data="d", output="o")
        for name in left:
            value = getattr(defaults, name)
            assert run.options[name] == (list(value) if isinstance(value, tuple) else value), name
        assert changed["steps"] == "4" and changed["lr"] == "0.01" and left["seed"] == "42"
        assert left["temperature"] == "3 for (d)bild, 1 for fkl and rkl"
        assert {name for name in changed if changed[name].endswith("(given, or decided by the run)")} <= DECIDED
    assert settings_of(inputs.trains[0]).title.endswith("left at it")


def test_a_record_of_an_earlier_version_lacks_options(inputs):
    import dataclasses

    run = inputs.trains[0]
    options = {name: value for name, value in run.options.items() if name != "lora"}
    lists = settings_of(dataclasses.replace(run, options=options)).lists
    assert all("lora" not in values for values in lists.values())


def test_held_out_samples_and_the_best_student(page, later_runs):
    text, _ = page
    titles = re.findall(r'aria-label="([^"]+)"', text)
    for word in ("CE", "Align", "VSD"):
        here = titles.index(f"{word}, nats per position")
        assert titles[here + 1] == f"{word} on held-out samples, nats per position"  # side by side
    assert "Exact match on held-out samples" in titles
    summary = json.loads((later_runs / "runs/lora/summary.json").read_text())
    evaluated = [entry for entry in summary["history"] if "eval_loss_ce" in entry]
    best = summary["best"]
    assert f"loss {best['value']:.4f}, step {best['step']}" in text
    assert f"{evaluated[-1]['eval_loss_vsd']:.4f}" in text
    assert "Other than the default" in text and "<dt>lora</dt><dd>4</dd>" in text


def test_every_student_is_run_on_the_store_that_it_learned_from(page):
    text, output = page
    titles = re.findall(r'aria-label="(Knees of [^"]+)"', text)
    assert titles == [
        "Knees of switch-kd and its teacher on samples of t.zarr",
        "Knees of lora and its teacher on samples of t.zarr",
        "Knees of mixture and its teacher on samples of a.zarr",
        "Knees of mixture and its teacher on samples of b.zarr",
    ]
    for name in ("sft", "live"):
        assert f"The knees of {name} are left out: it learned from none of the stores given" in output


def test_knees_for_a_chosen_store(finished_runs, later_runs, tmp_path):
    """Also of students that learned from no store, or from another data file."""
    words = ["report", str(finished_runs), str(later_runs), "--out", str(tmp_path), "--knees", "4"]
    done = CliRunner().invoke(main, [*words, "--knees-store", "b.zarr"])
    assert done.exit_code == 0, done.output
    titles = re.findall(r'aria-label="(Knees of [^"]+)"', (tmp_path / "report.html").read_text())
    assert titles == [
        f"Knees of {name} and its teacher on samples of b.zarr"
        for name in ("sft", "switch-kd", "live", "lora", "mixture")
    ]
    done = CliRunner().invoke(main, [*words, "--knees-store", "c.zarr"])
    assert done.exit_code == 2 and "there are: t.zarr, a.zarr, b.zarr" in done.output


def changed(folder, path, right):
    """Copy an evaluation, with these questions answered correctly and the others wrongly."""
    shutil.copytree(folder, path)
    lines = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
    lines = [line | {"correct": number in right} for number, line in enumerate(lines)]
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_differences_from_a_baseline_by_question_type(finished_runs, tmp_path):
    lines = changed(finished_runs / "eval/sft", tmp_path / "ours", {0, 1, 2, 4, 5})
    changed(finished_runs / "eval/sft", tmp_path / "theirs", {0, 3})
    shutil.copytree(finished_runs / "eval/teacher", tmp_path / "other")
    record = yaml.safe_load((tmp_path / "other/run.yaml").read_text())
    (tmp_path / "other/run.yaml").write_text(yaml.safe_dump(record | {"data_sha256": "0"}))
    found = find_inputs([(None, tmp_path)])
    section = Section("Scores")
    add_differences(section, found, next(run for run in found.evals if run.label == "theirs"))
    (table,) = section.tables
    rows = {row[1]: row for row in table.rows}
    assert list(rows) == ["all questions", "color"] and all(row[0] == "ours" for row in table.rows)
    for kind, row in rows.items():
        numbers = [i for i, line in enumerate(lines) if kind == "all questions" or line["question_type"] == kind]
        ours, theirs = (np.mean([i in right for i in numbers]) for right in ({0, 1, 2, 4, 5}, {0, 3}))
        gained, lost = (len(set(numbers) & right) for right in ({1, 2, 4, 5}, {3}))
        assert row[2:4] == [str(len(numbers)), f"{ours - theirs:+.4f}"] and row[5:] == [str(gained), str(lost)]
        low, high = map(float, row[4].split(" … "))
        assert low < ours - theirs < high
    assert [figure.name for figure in section.figures] == ["differences"]
    assert f"color ({len(numbers)})" in section.figures[0].svg
    assert any("The differences of other from theirs are left out: " in line for line in section.missing)


def test_differences_from_a_baseline_by_benchmark(tmp_path):
    for name, gqa in (("ours", 70.0), ("theirs", 64.0)):
        report_runs.benchmarks(tmp_path / name, [50.0, 60.0, 70.0, 80.0, gqa, 40.0, 20.0, 55.0, 45.0, 90.0])
    found = find_inputs([(None, tmp_path)])
    section = Section("Scores")
    add_differences(section, found, next(run for run in found.evals if run.label == "theirs"))
    ((name, benchmark, count, difference, interval, score, theirs),) = section.tables[0].rows
    assert (name, count, difference) == ("ours", "100", f"{float(score) - float(theirs):+.1f}")
    assert benchmark.startswith("GQA") and "…" in interval


def test_differences_that_an_evaluation_recorded(finished_runs, tmp_path):
    """`eval --baseline` wrote them; the report needs no option."""
    from switchkd.pipelines.evaluation.exact_match import evaluate
    from switchkd.pipelines.evaluation.options import EvalOptions

    shutil.copytree(finished_runs / "eval/teacher", tmp_path / "teacher")
    shutil.copytree(finished_runs / "eval/sft", tmp_path / "theirs")
    record = yaml.safe_load((tmp_path / "teacher/run.yaml").read_text())
    names = ("model", "data", "images", "template", "max_new_tokens")
    options = {name: record[name] for name in names}
    evaluate(EvalOptions(output=tmp_path / "teacher", baseline=tmp_path / "theirs", **options))
    found, section = find_inputs([(None, tmp_path)]), Section("Scores")
    add_differences(section, found, None)
    assert [row[:3] for row in section.tables[0].rows] == [["teacher", "all questions", "9"], ["teacher", "color", "8"]]
    assert section.tables[0].head[3] == "difference from theirs" and len(section.figures) == 1
    board = {"name": "gqa", "split": "testdev", "score": 64.0}
    change = board | {"difference": 6.0, "interval": [1.0, 9.0], "units": 100}
    for run in found.evals:
        recorded = {"run": str(tmp_path / "elsewhere"), "benchmarks": [change]}
        run.scores.clear()
        run.scores.update(benchmarks=[board | {"score": 70.0}], baseline=recorded if run.label == "teacher" else None)
    add_differences(section := Section("Scores"), found, None)
    assert section.tables[0].head[3] == "difference from elsewhere"
    assert section.tables[0].rows == [["teacher", "GQA (testdev)", "100", "+6.0", "+1.0 … +9.0", "70.0", "64.0"]]


def test_a_baseline_that_is_not_there_is_named(finished_runs, tmp_path):
    words = ["report", str(finished_runs), "--out", str(tmp_path), "--baseline", "nobody"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "there are: sft, switch-kd, teacher" in done.output
    assert not (tmp_path / "report.html").exists()


def test_the_plot_of_a_store_has_a_panel_for_what_the_store_has(finished_runs, later_runs, tmp_path, monkeypatch):
    from matplotlib import pyplot

    from switchkd.pipelines.reporting.store_plots import plot_store

    stores = {finished_runs / "stores/t.zarr": 3, later_runs / "mix/stores/b.zarr": 2}  # the second cuts no tail off
    for path, panels in stores.items():
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(pyplot, "close", drawn.append)
            plot_store(path, tmp_path / "store.png")
        (figure,) = drawn
        assert len(figure.axes) == panels
        colours = [axes.patches[0].get_facecolor() for axes in figure.axes]
        assert len(set(colours)) == panels
        for axes in (figure.axes[0], figure.axes[-1]):
            assert all(tick == int(tick) for tick in axes.get_xticks())
        pyplot.close(figure)
