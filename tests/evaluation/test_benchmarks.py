"""Running benchmarks: answered once, resumed, scored apart, failures apart, submissions, the table, the baseline."""

import json
import shutil
from dataclasses import replace

import benchmark_data
import pytest
import yaml
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import ConfigError, DataError, InputError
from switchkd.pipelines.evaluation.benchmarks import run as run_module
from switchkd.pipelines.evaluation.benchmarks.registry import BENCHMARKS, TEN
from switchkd.pipelines.evaluation.benchmarks.run import run_benchmarks
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.evaluation.options import BenchmarkOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return benchmark_data.everything(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def options(root, teacher, tmp_path):
    return BenchmarkOptions(
        tasks=("all",),
        benchmarks=root,
        output=tmp_path / "out",
        model=teacher,
        template="qa",
        max_new_tokens=2,
        batch_size=7,
    )


@pytest.fixture
def scripted(monkeypatch):
    """Answer from the script; prompts are encoded for real, so what cannot be asked fails as it would."""
    asked = []

    def encode_and_answer(encoder, question):
        encode(encoder, question)
        asked.append(question.id)
        return benchmark_data.answer(question)

    encode = run_module._encode
    monkeypatch.setattr(run_module, "_encode", encode_and_answer)
    monkeypatch.setattr(GreedyGenerator, "answer", lambda self, answers: answers)
    return asked


def board(options):
    return json.loads((options.output / "scores.json").read_text())


def entry(options, name):
    return next(row for row in board(options)["benchmarks"] if row["name"] == name)


def lines(options, folder):
    return [json.loads(line) for line in (options.output / folder / "predictions.jsonl").read_text().splitlines()]


def one(options, name, **changes):
    return replace(options, tasks=(name,), **changes)


def test_all_ten_with_averages_and_intervals(options, scripted):
    table = run_benchmarks(options)
    scores = {row["name"]: row["score"] for row in board(options)["benchmarks"]}
    assert scores == pytest.approx({b.name: benchmark_data.SCORES[b.name] for b in TEN}, abs=1e-9)
    averages = board(options)["averages"]
    seven = ("mme", "mmbench", "mmbench-cn", "gqa", "scienceqa", "textvqa", "vizwiz")
    assert averages["avg7"] == {"score": pytest.approx(sum(scores[n] for n in seven) / 7), "missing": [], "limited": []}
    assert averages["avg10"]["score"] == pytest.approx(sum(scores.values()) / 10)
    for row in board(options)["benchmarks"]:
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
        assert not row["failed"] and not row["units_left_out"]
    assert table.splitlines()[0] == (
        "| model | MME | MMB | MMB-CN | VQAv2 (val) | GQA | SciQA | MMMU | TextVQA | VizWiz (val) | POPE | Avg7 | Avg10 |"
    )
    assert "\nThe averages take VQAv2 and VizWiz on val; published ones take their test splits.\n" in table
    assert "\nMME: perception_points 1,775.00, cognition_points 0.00, existence_points 50.00," in table
    assert "\nPOPE: random_accuracy 100.00, random_precision 100.00," in table
    cells = table.splitlines()[2].split(" | ")
    assert cells[1:6] == ["88.8", "50.0", "0.0", "83.3", "66.7"]
    assert (options.output / "scores.md").read_text() == table


def test_a_real_model_answers_greedily_and_is_scored(options):
    run_benchmarks(one(options, "pope"))
    found = lines(options, "pope-coco")
    assert len(found) == 12 and all(0 < len(line["prediction"].split()) <= 2 for line in found)
    assert entry(options, "pope")["units"] == 12
    answers = {line["id"]: line["prediction"] for line in found}
    run_benchmarks(one(options, "pope", output=options.output.with_name("alone"), batch_size=1))
    alone = {
        line["id"]: line["prediction"]
        for line in lines(replace(options, output=options.output.with_name("alone")), "pope-coco")
    }
    assert answers == alone


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(options, scripted):
    run_benchmarks(one(options, "gqa"))
    path = options.output / "gqa-testdev/predictions.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text(kept[0] + kept[1][:20])
    scripted.clear()
    run_benchmarks(one(options, "gqa", batch_size=1))  # how many share a batch is free to change
    assert len(scripted) == 2
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(kept)
    assert entry(options, "gqa")["score"] == pytest.approx(benchmark_data.SCORES["gqa"])


def test_scoring_is_apart_from_answering(options, scripted, monkeypatch):
    run_benchmarks(one(options, "gqa"))
    first = board(options)
    (options.output / "gqa-testdev/result.json").unlink()
    monkeypatch.setattr("switchkd.pipelines.evaluation.benchmarks.run.load_model", None)
    run_benchmarks(one(options, "gqa", score_only=True, model=None))
    assert board(options) == first


def test_scoring_what_is_not_answered_is_refused(options, scripted):
    with pytest.raises(InputError, match="holds no answers to gqa"):
        run_benchmarks(one(options, "gqa", score_only=True))
    run_benchmarks(one(options, "gqa"))
    path = options.output / "gqa-testdev/predictions.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="2 of 3 questions of gqa \\(testdev\\) are unanswered"):
        run_benchmarks(one(options, "gqa", score_only=True))


def test_failures_are_counted_apart_and_never_scored(options, scripted, root, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(root, own)
    options = replace(options, benchmarks=own)
    (own / "vizwiz/val/b.jpg").write_bytes(b"no image")
    (own / "mme/MME_Benchmark_release_version/count/0002.jpg").unlink()
    run_benchmarks(replace(options, tasks=("vizwiz", "mme")))
    found = entry(options, "vizwiz")
    assert (found["failed"], found["units"], found["units_left_out"]) == ({"image_unreadable": 1}, 1, 1)
    assert found["score"] == 100  # of the one that could be asked
    found = entry(options, "mme")
    assert (found["failed"], found["units_left_out"]) == ({"image_missing": 2}, 1)
    assert found["score"] == (8 * 200 + 200 + 50) / 20
    assert "| 1 | 1 | 1 image_unreadable |" in (options.output / "scores.md").read_text()
    # Mended, they are asked only where one says so.
    shutil.copy(root / "vizwiz/val/b.jpg", own / "vizwiz/val/b.jpg")
    scripted.clear()
    run_benchmarks(one(options, "vizwiz"))
    assert scripted == []
    run_benchmarks(one(options, "vizwiz", retry_failed=True))
    assert scripted == ["b.jpg"]
    assert entry(options, "vizwiz")["score"] == pytest.approx(80)
    assert entry(options, "vizwiz")["failed"] == {}


def test_averages_say_what_was_left_out(options, scripted, root, tmp_path):
    shutil.copytree(root, tmp_path / "own")
    (tmp_path / "own/gqa/images/n0.jpg").unlink()
    table = run_benchmarks(replace(options, benchmarks=tmp_path / "own"))
    assert "take their test splits. Some questions of GQA could not be asked and are left out.\n" in table


def test_a_part_without_an_answer_leaves_the_score_blank(options, scripted, root, tmp_path):
    shutil.copytree(root / "mme", tmp_path / "own/mme")
    (tmp_path / "own/mme/MME_Benchmark_release_version/color/0001.jpg").unlink()
    table = run_benchmarks(one(options, "mme", benchmarks=tmp_path / "own"))
    assert entry(options, "mme")["score"] is None
    assert entry(options, "mme")["note"] == "no answer in color"
    assert "Avg7 is left blank: MME, MMB," in table


def test_too_long_prompts_fail(options, scripted):
    run_benchmarks(one(options, "gqa", max_length=8))
    assert entry(options, "gqa")["failed"] == {"too_long": 3}
    assert (entry(options, "gqa")["score"], entry(options, "gqa")["note"]) == (None, "no answer at all")


@pytest.mark.parametrize(
    ("task", "file", "content"),
    [
        (
            "vqav2:test-dev",
            "vqav2-test-dev/vqa_OpenEnded_results.json",
            [
                {"question_id": 1, "answer": "yes"},
                {"question_id": 2, "answer": "2"},
                {"question_id": 3, "answer": "t shirt"},
                {"question_id": 4, "answer": ""},  # of test, not of test-dev
            ],
        ),
        (
            "textvqa-no-ocr:test",
            "textvqa-no-ocr-test/textvqa_results.json",
            [{"question_id": 10, "answer": "nokia"}, {"question_id": 11, "answer": "7"}],
        ),
        (
            "vizwiz:test",
            "vizwiz-test/vizwiz_results.json",
            [{"image": "a.jpg", "answer": "unanswerable"}, {"image": "b.jpg", "answer": "soup"}],
        ),
    ],
)
def test_splits_without_public_answers_give_a_submission_and_no_score(options, scripted, task, file, content):
    table = run_benchmarks(one(options, task))
    assert json.loads((options.output / file).read_text()) == content
    (row,) = board(options)["benchmarks"]
    assert (row["score"], row["interval"], row["submission"]) == (None, None, file)
    assert f"answers are not public: see the submission file: {file}" in table


def test_the_submission_of_mmbench_is_a_spreadsheet(options, scripted):
    openpyxl = pytest.importorskip("openpyxl", reason="extra eval")
    run_benchmarks(one(options, "mmbench:test"))
    rows = list(openpyxl.load_workbook(options.output / "mmbench-test/submission.xlsx").active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction")
    assert rows[1] == (3, "What is it?", "cat", "dog", "cow", None, "B")
    assert len(rows) == 6


def test_the_submission_of_mmmu_holds_letters(options, scripted):
    run_benchmarks(one(options, "mmmu:test"))
    found = json.loads((options.output / "mmmu-test/mmmu_results.json").read_text())
    assert (found["test_Accounting_1"], found["test_Accounting_4"], len(found)) == ("B", "In Paris.", 33)


def test_a_baseline_shows_paired_differences(options, scripted, student, monkeypatch):
    run_benchmarks(replace(options, tasks=("gqa", "pope")))
    worse = replace(options, output=options.output.with_name("worse"), model=student)
    with monkeypatch.context() as patch:
        patch.setitem(benchmark_data.ANSWERS, "gqa", benchmark_data.ANSWERS["gqa"] | {"1": "right"})
        run_benchmarks(one(worse, "gqa"))
    table = run_benchmarks(replace(options, tasks=("gqa", "pope"), baseline=worse.output))
    baseline = board(options)["baseline"]
    (row,) = baseline["benchmarks"]  # pope is missing from the baseline
    assert row["name"] == "gqa" and row["units"] == 3
    assert row["difference"] == pytest.approx(100 / 3)
    assert row["interval"][0] == 0 and row["interval"][1] == pytest.approx(100)
    assert baseline["model"] == str(student)
    assert "| difference |  |  |  |  | +33.3 |" in table
    # Both folders have the same name, so the rows show where they lie.
    names = ["/".join(path.parts[-2:]) for path in (options.model, student)]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == [f"| {name}" for name in names]


def test_a_baseline_with_other_questions_is_refused(options, scripted, root, tmp_path):
    run_benchmarks(one(options, "gqa"))
    shutil.copytree(root / "gqa", tmp_path / "own/gqa")
    path = tmp_path / "own/gqa/testdev_balanced_questions.json"
    path.write_text(path.read_text().replace("Is it 1?", "Was it 1?"))
    other = one(options, "gqa", benchmarks=tmp_path / "own", output=tmp_path / "other")
    with pytest.raises(DataError, match=r"gqa \(testdev\) of .* answered other questions"):
        run_benchmarks(replace(other, baseline=options.output))
    with pytest.raises(ConfigError, match="begun with other options:\n  fingerprint"):
        run_benchmarks(replace(other, output=options.output))
    with pytest.raises(DataError, match="shares no scored benchmark"):
        run_benchmarks(replace(other, baseline=tmp_path))


def test_another_model_in_the_same_output_is_refused(options, scripted, student):
    run_benchmarks(one(options, "gqa"))
    with pytest.raises(ConfigError, match=r"begun with other options:\n  model: .*\n  weights: "):
        run_benchmarks(one(options, "pope", model=student))


def test_files_are_looked_for_before_any_question_is_asked(options, scripted, root, tmp_path):
    shutil.copytree(root / "gqa", tmp_path / "own/gqa")
    with pytest.raises(DataError, match="pope \\(coco\\) needs the file .*coco_pope_random.json"):
        run_benchmarks(replace(options, tasks=("gqa", "pope"), benchmarks=tmp_path / "own"))
    assert scripted == []
    (tmp_path / "own/gqa/testdev_balanced_questions.json").write_text('{"1": {"question": "What?"}}')
    with pytest.raises(DataError, match=r"gqa \(testdev\): a file is not in the published format: KeyError"):
        run_benchmarks(one(options, "gqa", benchmarks=tmp_path / "own"))


@pytest.mark.parametrize("inside", [False, True], ids=["the folder above playground", "playground/data/eval"])
def test_llavas_layout_gives_the_same_scores(options, scripted, root, tmp_path, inside):
    above = benchmark_data.as_llava_has_it(tmp_path / "LLaVA", root)
    names = [b.name for b in TEN if b.name not in ("vqav2", "mmmu")]
    folder = above / "playground/data/eval" if inside else above
    run_benchmarks(replace(options, tasks=(*names, "vqav2:test-dev", "vizwiz:test"), benchmarks=folder))
    scores = {row["name"]: row["score"] for row in board(options)["benchmarks"] if row["score"] is not None}
    assert scores == pytest.approx({name: benchmark_data.SCORES[name] for name in names}, abs=1e-9)
    texts = {line["id"]: line["question"] for line in lines(options, "textvqa-val")}
    assert texts["10"].startswith("What brand?\nReference OCR token: NOKIA, 3310\nAnswer")
    found = json.loads((options.output / "vqav2-test-dev/vqa_OpenEnded_results.json").read_text())
    assert [row["answer"] for row in found] == ["yes", "2", "t shirt", ""]
    # The published questions are the same ones: answers go on being theirs, and two copies can be compared.
    done = len(scripted)
    run_benchmarks(replace(options, tasks=("gqa", "pope", "vqav2:test-dev"), benchmarks=root))
    assert len(scripted) == done


def test_a_missing_file_is_named_in_both_layouts(options, tmp_path):
    place = tmp_path / "LLaVA/playground/data/eval"
    place.mkdir(parents=True)
    with pytest.raises(
        DataError, match="needs the file .*/gqa/testdev_balanced_questions.json, or in LLaVA's layout "
    ) as e:
        run_benchmarks(one(options, "gqa", benchmarks=place))
    assert f"{place}/gqa/data/testdev_balanced_questions.json; none is there" in str(e.value)
    with pytest.raises(DataError, match="playground/data/eval/gqa/data/testdev_balanced"):
        run_benchmarks(one(options, "gqa", benchmarks=tmp_path / "LLaVA"))


def test_a_prompt_that_llavas_file_lacks_is_named(options, root, tmp_path):
    above = benchmark_data.as_llava_has_it(tmp_path / "LLaVA", root)
    path = above / "playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl"
    kept = path.read_text().splitlines()[0]
    path.write_text(kept + "\n")
    with pytest.raises(DataError, match="has no prompt for the question 'what number\\?' about image i1"):
        run_benchmarks(one(options, "textvqa", benchmarks=above))
    path.write_text(kept + "\n{")
    with pytest.raises(DataError, match="ocr.jsonl line 2 is not JSON"):
        run_benchmarks(one(options, "textvqa", benchmarks=above))


def test_a_sample_is_labelled_everywhere_and_in_no_average(options, scripted):
    table = run_benchmarks(replace(options, limit=2))
    assert "| GQA (sample of 2) |" in table.splitlines()[0] and "VQAv2 (val, sample of 2)" in table.splitlines()[0]
    found = entry(options, "gqa")
    assert (found["limited_to"], found["split_units"], found["units"], found["questions"]) == (2, 3, 2, 2)
    assert found["note"] == "a sample of 2 of 3"
    assert (entry(options, "mmbench")["limited_to"], entry(options, "mmbench")["units"]) == (None, 2)  # both there are
    averages = board(options)["averages"]
    assert averages["avg7"]["score"] is None and "GQA" in averages["avg7"]["limited"]
    # MME has 14 tasks: two images do not give a score.
    assert entry(options, "mme")["score"] is None and "; a sample of 2 of 15" in entry(options, "mme")["note"]
    # Without a limit, the others are asked, and none twice.
    table = run_benchmarks(options)
    assert len(scripted) == sum(len(benchmark_data.ANSWERS[b.name]) for b in TEN)
    scores = {row["name"]: row["score"] for row in board(options)["benchmarks"]}
    assert scores == pytest.approx({b.name: benchmark_data.SCORES[b.name] for b in TEN}, abs=1e-9)
    assert "sample" not in table and board(options)["averages"]["avg10"]["limited"] == []


def test_a_sample_of_a_split_without_public_answers_gives_no_submission(options, scripted):
    run_benchmarks(one(options, "vqav2:test-dev", limit=1))
    (row,) = board(options)["benchmarks"]
    assert (row["submission"], row["note"]) == (None, "answers are not public; a sample of 1 of 3")
    assert not list((options.output / "vqav2-test-dev").glob("vqa_*"))


def test_a_baseline_on_a_sample_is_labelled(options, scripted):
    whole = replace(options, output=options.output.with_name("whole"))
    run_benchmarks(one(whole, "gqa"))
    run_benchmarks(one(options, "gqa", limit=2))
    table = run_benchmarks(one(whole, "gqa", baseline=options.output))
    assert "(sample of 2) |" in table.splitlines()[3] and "sample" not in table.splitlines()[2]
    assert board(whole)["baseline"]["benchmarks"][0]["units"] == 2


def test_results_of_earlier_versions_open(options, scripted):
    run_benchmarks(replace(options, tasks=("gqa", "pope")))
    path = options.output / "gqa-testdev/result.json"
    content = json.loads(path.read_text())
    for name in ("limited_to", "split_units"):
        del content[name]
    path.write_text(json.dumps(content))
    run_benchmarks(one(options, "pope"))
    assert entry(options, "gqa")["limited_to"] is None


def run(*words):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def test_the_list_names_every_benchmark_and_its_files():
    shown = run("--list")
    assert shown.exit_code == 0
    for benchmark in BENCHMARKS.values():
        for split, needs in benchmark.splits.items():
            assert f"  {benchmark.name}:{split}" in shown.stdout
            assert f"    {benchmark.folder}/{needs.files[0]}" in shown.stdout
        assert benchmark.home in shown.stdout


def test_the_command_prints_the_table(options, scripted):
    done = run(
        "--model", options.model, "--task", "gqa", "--task", "vizwiz:val", "--benchmarks", options.benchmarks,
        "--output", options.output, "--template", "qa",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "| GQA | testdev | exact match | 66.67 |" in done.stdout
    assert f"scores: {options.output / 'scores.json'}" in done.stdout


def test_tasks_can_come_from_a_file(options, scripted, tmp_path):
    asked = {"model": str(options.model), "task": ["gqa"], "benchmarks": str(options.benchmarks), "template": "qa"}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(asked))
    done = run("--config", tmp_path / "eval.yaml", "--output", options.output)
    assert done.exit_code == 0, done.output
    assert [row["name"] for row in board(options)["benchmarks"]] == ["gqa"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "gqa", "--output", "o"), "--task gqa needs --model"),
        (("--task", "gqa", "--model", "m", "--output", "o"), "--task gqa needs --benchmarks"),
        (("--model", "m", "--output", "o"), "--task exact-match needs --data"),
        (("--task", "gqa", "--task", "exact-match", "--output", "o"), "exact-match is a task of its own"),
        (
            ("--model", "m", "--data", "d", "--score-only", "--output", "o"),
            "--score-only does not go with --task exact-match",
        ),
        (
            ("--task", "gqa", "--model", "m", "--benchmarks", "b", "--data", "d", "--output", "o"),
            "--data does not go with",
        ),
        (
            ("--task", "mmvet", "--model", "m", "--benchmarks", "b", "--output", "o"),
            "no benchmark 'mmvet'; there are mme,",
        ),
        (
            ("--task", "gqa:val", "--model", "m", "--benchmarks", "b", "--output", "o"),
            "gqa has no split 'val'; it has testdev",
        ),
        (
            ("--task", "gqa", "--model", "m", "--benchmarks", "b", "--output", "o"),
            "needs the file b/gqa/testdev_balanced",
        ),
    ],
)
def test_mistakes_end_with_a_message_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the paths name something
    for folder in ("m", "b"):
        (tmp_path / folder).mkdir()
    for file in ("m/config.json", "d"):
        (tmp_path / file).write_text("{}")
    failed = run(*words)
    assert failed.exit_code == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.output


def test_questions_that_spell_out_the_image_marker_are_not_asked(options, scripted, root, tmp_path):
    shutil.copytree(root / "gqa", tmp_path / "own/gqa")
    path = tmp_path / "own/gqa/testdev_balanced_questions.json"
    path.write_text(path.read_text().replace("Is it 1?", "Is it <image>?"))
    run_benchmarks(one(options, "gqa", benchmarks=tmp_path / "own"))
    assert entry(options, "gqa")["failed"] == {"several_images": 1}
