"""Ablations that are evaluated on benchmarks: columns of scores, answers kept by benchmark, mistakes told before any work."""

import csv
import json
from pathlib import Path

import benchmark_data
import pytest
import tiny
import yaml

from switchkd.errors import ConfigError, DataError, InputError, RunError
from switchkd.pipelines.ablation import ablate as module
from switchkd.pipelines.ablation.ablate import ablate
from switchkd.pipelines.ablation.evaluation import evaluate
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.plan import plan_jobs
from switchkd.pipelines.ablation.recipe import read_recipe
from switchkd.pipelines.evaluation.benchmarks import run as run_module
from switchkd.pipelines.evaluation.options import BenchmarkOptions

pytest.importorskip("matplotlib", reason="the table's plot is drawn with matplotlib")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return benchmark_data.everything(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def place(teacher, student, benchmarks, tmp_path):
    """A recipe of one step of SFT on tiny checkpoints, evaluated on two benchmarks."""
    data = tiny.data(tmp_path / "data", tiny.rows(4))
    common = {"data": str(data), "images": str(data.parent / "images"), "template": "qa"}
    content = {
        "title": "Tiny",
        "teachers": {"t": str(teacher)},
        "students": {"s": str(student)},
        "stages": {"all": common | {"steps": 1, "batch_size": 2, "accumulation": 1}},
        "evaluate": {"tasks": ["gqa", "pope"], "benchmarks": str(benchmarks), "template": "qa", "max_new_tokens": 2},
        "matrix": {"objective": "sft", "scheme": "sft", "seed": [0, 1]},
    }
    return save(tmp_path, content)


def save(folder, content):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder


def evaluated_on(place, **entries):
    content = yaml.safe_load((place / "tiny.yaml").read_text())
    content["evaluate"] |= entries
    return save(place, {name: value for name, value in content.items() if value is not None})


def options_of(place):
    return AblateOptions(recipe=str(place / "tiny.yaml"), workdir=place / "work")


@pytest.fixture
def asked(monkeypatch):
    found, encode = [], run_module._encode
    monkeypatch.setattr(run_module, "_encode", lambda encoder, q: found.append(q.id) or encode(encoder, q))
    return found


def test_scores_are_columns_and_answers_are_kept_by_benchmark(place, asked, monkeypatch):
    done = ablate(options_of(place))
    assert done.table.splitlines()[2] == "| student | mean score | each seed | GQA | POPE | questions | training time |"
    cells = list(csv.DictReader((place / "work/tiny-cells.csv").read_text().splitlines()))
    assert len(cells) == 2
    for cell in cells:
        assert float(cell["mean_score"]) == pytest.approx((float(cell["GQA"]) + float(cell["POPE"])) / 2)
        assert cell["questions"] == "15"
    scores = [json.loads(path.read_text()) for path in (place / "work/evals").glob("*/scores.json")]
    assert sorted(row["score"] for board in scores for row in board["benchmarks"]) == sorted(
        float(cell[name]) for cell in cells for name in ("GQA", "POPE")
    )
    # Another benchmark asks its own questions alone, and trains nothing.
    asked.clear()
    monkeypatch.setattr(module, "train", None)
    again = ablate(options_of(evaluated_on(place, tasks=["gqa", "pope", "vizwiz"])))
    assert set(asked) == {"a.jpg", "b.jpg"} and len(asked) == 4
    assert "| GQA | POPE | VizWiz (val) |" in again.table
    asked.clear()
    sample = ablate(options_of(evaluated_on(place, tasks=["gqa"], limit=2)))
    assert "| GQA (sample of 2) |" in sample.table and asked == []


def test_a_recipe_replaces_what_its_base_is_evaluated_on(benchmarks, tmp_path):
    evaluate = {"tasks": ["gqa:testdev"], "benchmarks": str(benchmarks)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "table3", "evaluate": evaluate}))
    names = ("teacher_3b", "student_05b", "pt_data", "pt_images", "ft_data", "ft_images")
    recipe = read_recipe(str(tmp_path / "mine.yaml"), dict.fromkeys(names, "x"), Path("work"))
    assert recipe.evaluate == {"tasks": ("gqa:testdev",), "benchmarks": benchmarks, "template": "qwen2_base"}
    on_file = {"base": "mine.yaml", "evaluate": {"data": "d.json"}}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(on_file))
    recipe = read_recipe(str(tmp_path / "file.yaml"), dict.fromkeys(names, "x"), Path("work"))
    assert recipe.evaluate == {"data": Path("d.json"), "template": "qwen2_base"}


def test_comparisons_need_all_answers_to_a_data_file(place):
    content = yaml.safe_load((place / "tiny.yaml").read_text())
    compare = {"arms": {"a": {"objective": "sft"}}, "pairs": []}
    for given in (content["evaluate"], {"data": "d.json", "limit": 3}):
        save(place, content | {"compare": compare, "evaluate": given})
        with pytest.raises(ConfigError, match="compare reads all answers to a data file"):
            read_recipe(str(place / "tiny.yaml"), {}, place)


MISTAKES = {
    "no such benchmark": ({"tasks": ["gqa", "mmvet"]}, ConfigError, "evaluate: no benchmark 'mmvet'"),
    "no public answers": ({"tasks": ["vizwiz:test"]}, ConfigError, r"evaluate: vizwiz \(test\) cannot be scored here"),
    "no files": ({"benchmarks": "nowhere"}, DataError, r"evaluate: gqa \(testdev\) needs the file nowhere/gqa/"),
    "both": ({"data": "d.json"}, ConfigError, "evaluate has both tasks and data"),
    "no list": ({"tasks": "gqa"}, ConfigError, "evaluate: tasks should be a list of benchmarks, found 'gqa'"),
    "no questions": ({"tasks": []}, ConfigError, "evaluate: tasks should be a list"),
    "no limit": ({"limit": 0}, ConfigError, "evaluate: limit cannot be 0"),
    "the cell's own": ({"baseline": "x"}, ConfigError, "evaluate has no 'baseline'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_any_work(place, monkeypatch, mistake):
    entries, error, message = MISTAKES[mistake]
    monkeypatch.setattr(module, "train", None)
    with pytest.raises(error, match=message) as told:
        ablate(options_of(evaluated_on(place, **entries)))
    assert isinstance(told.value, InputError) and not (place / "work/runs").exists()


def test_a_benchmark_without_a_score_ends_the_run(teacher, benchmarks, tmp_path):
    options = BenchmarkOptions(
        tasks=("mme",), benchmarks=benchmarks, output=tmp_path, model=teacher, template="qa", max_length=4
    )
    with pytest.raises(RunError, match=r"mme \(test\) has no score: no answer at all, see .*retry_failed: true"):
        evaluate(options)


def test_names_of_earlier_evaluations_stay(place):
    """The name of a cell's answers and of its result, as every version since recipes has made it."""
    content = yaml.safe_load((place / "tiny.yaml").read_text())
    save(place, content | {"evaluate": {"data": "d", "template": "qa"}, "teachers": {"t": "m"}, "matrix": {"seed": 0}})
    job = next(plan_jobs(read_recipe(str(place / "tiny.yaml"), {}, place), AblateOptions(recipe="x", device="cpu")))
    assert (job.evaluation.output.name, job.result.stem) == ("6909bf42dd17", "6909bf42dd17")
