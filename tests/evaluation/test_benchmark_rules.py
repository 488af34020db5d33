"""Scoring rules of the benchmarks, against cases worked out by hand from the official scripts."""

import benchmark_data
import numpy as np
import pytest
import reference

from switchkd.errors import DataError
from switchkd.pipelines.evaluation import intervals
from switchkd.pipelines.evaluation.benchmarks import mmbench, mme, mmmu, normalise, pope, scienceqa, vqa
from switchkd.pipelines.evaluation.benchmarks.base import Answer, units_of
from switchkd.pipelines.evaluation.benchmarks.layouts import find_files
from switchkd.pipelines.evaluation.benchmarks.registry import BENCHMARKS
from switchkd.pipelines.evaluation.intervals import Unit, by_stratum, means_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return benchmark_data.everything(tmp_path_factory.mktemp("benchmarks"))


def scored(name, root, **changed):
    benchmark = BENCHMARKS[name]
    split = next(iter(benchmark.splits))
    questions = benchmark.read(find_files(benchmark, root, split), split)
    units = units_of(benchmark, questions, benchmark_data.ANSWERS[name] | changed)
    return benchmark, questions, units


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_in_its_published_layout_scores_as_worked_out_by_hand(name, root):
    benchmark, questions, units = scored(name, root)
    assert {q.id for q in questions} == benchmark_data.ANSWERS[name].keys()
    assert float(benchmark.headline(means_of(by_stratum(units)))) == pytest.approx(
        benchmark_data.SCORES[name], abs=1e-9
    )
    for question in questions:
        assert question.load()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0"), question.image
        assert "<image>" not in question.text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_file_is_named(name, root, tmp_path):
    for split, needs in BENCHMARKS[name].splits.items():
        with pytest.raises(
            DataError, match=rf"^{name} \({split}\) needs the f\w+ .*/{needs.files[0].split('*')[0].rstrip('/')}"
        ):
            find_files(BENCHMARKS[name], tmp_path, split)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mme", "Is this red?\nAnswer the question using a single word or phrase."),
        (
            "mmbench",
            "What is it?\nA. cat\nB. dog\nC. cow\nAnswer with the option's letter from the given choices directly.",
        ),
        ("mmbench-cn", "这是什么？\nA. cat\nB. dog\nC. cow\n请直接回答选项字母。"),
        ("vqav2", "What is number 1?\nAnswer the question using a single word or phrase."),
        ("gqa", "Is it 0?\nAnswer the question using a single word or phrase."),
        (
            "scienceqa",
            "Context: It is cold.\nWhat?\nA. ice\nB. fog\nC. dew\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "mmmu",
            "What is <image 1>?\n\n(A) $6\n(B) $7\n(C) $8\n\n\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "textvqa",
            "what brand?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase.",
        ),
        ("textvqa-no-ocr", "what brand?\nAnswer the question using a single word or phrase."),
        (
            "vizwiz",
            "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
        ),
        ("pope", "Is there a cat?\nAnswer the question using a single word or phrase."),
    ],
)
def test_the_prompt_is_that_of_llavas_protocol(name, text, root):
    assert scored(name, root)[1][0].text == text


def test_mme_points(root):
    benchmark, _, units = scored("mme", root)
    details = benchmark.details(units)
    assert details["perception_points"] == pytest.approx(1775)
    assert (details["count_points"], details["existence_points"], details["cognition_points"]) == (125, 50, 0)
    assert (details["count_accuracy"], details["count_accuracy_plus"]) == (75, 50)


@pytest.mark.parametrize(
    ("text", "word"),
    [("Yes", "yes"), ("no.", "no"), ("Not so", "no"), ("the yes", "other"), ("a no", "no"), ("", "other")],
)
def test_mme_reads_the_first_four_characters(text, word):
    assert mme.yes_or_no(text) == word


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B) dog", "B"),
        ("b", ""),
        ("A cat", "A"),
        ("A dog sits here", "A"),  # VLMEvalKit takes "A" for an article only where VERBOSE is set
        ("B because it barks at me", ""),  # sixth from the end
        ("A or B", ""),
        ("DOG", "B"),
        ("Z", ""),
        ("Z: dog", ""),
        ("Cannot determine the answer: dog", ""),
        ("It may well be a dog", ""),  # more than twice as long as both options
        ("", ""),
    ],
)
def test_mmbench_reads_one_option(text, letter):
    assert mmbench.option_in(text, {"A": "cat", "B": "dog"}) == letter


def test_none_is_an_option_of_mmbench_and_nothing_is_not(tmp_path):
    path = tmp_path / "mmbench_dev_20230712.tsv"
    head, cells = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n", "How many?\tnan\tNone\tTwo\tnan\t\tA\t\n"
    path.write_text(head + f"1\t{cells}1000001\t{cells}")
    question = BENCHMARKS["mmbench"].read({path.name: path}, "dev")[0]
    assert question.text.startswith("How many?\nA. None\nB. Two\nAnswer with")
    assert question.reference["options"] == {"A": "None", "B": "Two"}


def test_mmbench_needs_every_rotation(root):
    benchmark, _, units = scored("mmbench", root)
    assert {unit.id: unit.values for unit in units} == {"3": (1, 1), "7": (0, 1)}
    assert benchmark.details(units) == {"without_rotation": 100, "kind3": 100, "kind7": 0}


def test_a_unit_with_an_unanswered_question_is_left_out(root):
    benchmark, questions, _ = scored("mmbench", root)
    answers = {k: v for k, v in benchmark_data.ANSWERS["mmbench"].items() if k != "1000007"}
    assert [unit.id for unit in units_of(benchmark, questions, answers)] == ["3"]


def test_pope_figures_of_each_part(root):
    benchmark, _, units = scored("pope", root)
    details = benchmark.details(units)
    assert {name: details[f"popular_{name}"] for name in ("accuracy", "precision", "recall", "yes")} == {
        "accuracy": 50,
        "precision": 50,
        "recall": 100,
        "yes": 100,
    }
    assert (details["adversarial_f1"], details["adversarial_precision"]) == (0, 0)
    assert details["mean_accuracy"] == pytest.approx(200 / 3)
    assert details["mean_f1"] == pytest.approx(benchmark_data.SCORES["pope"])


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", True), ("No", False), ("no, thanks", False), ("It is. No", True), ("Nothing", True), ("", True)],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert pope.says_yes(text) is yes


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" C ", "C"),
        ("C. dew", "C"),
        ("C.dew", ""),
        ("The answer is D", "D"),
        ("dew", ""),
        ("B\nfog", "B"),
        ("F", ""),
        ("The answer is A or so. The answer is C.", "C"),
        ("It: The answer is E", "E"),
    ],
)
def test_scienceqa_reads_a_letter(text, letter):
    assert scienceqa.letter_of(text) == letter


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two Dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("twas", "'twas"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("t-shirt", "t shirt"),
        ("red , blue", "red blue"),
        ("a/b", "b"),
        ("what?\tyes\n", "what yes"),
        ("10 - 2", "10 2"),
        ("", ""),
    ],
)
def test_the_vqa_normaliser(text, normal):
    assert normalise.vqa_normal(text) == normal


def test_the_contractions_are_the_official_ones():
    # Counted in vqaEval.py: 120 entries, less 4 of "I", which lower-cased text never meets, and 2 that map to themselves.
    assert len(normalise.CONTRACTIONS) == 114


@pytest.mark.parametrize(("text", "normal"), [("Nokia's", "nokia 's"), ("1,000?", "1000"), ("The Cat", "cat")])
def test_the_textvqa_normaliser(text, normal):
    assert normalise.textvqa_normal(text) == normal


@pytest.mark.parametrize("equal", range(11))
def test_consensus_leaves_one_person_out_at_a_time(equal):
    people = ["a"] * equal + ["b"] * (10 - equal)
    assert vqa.consensus("a", people) == pytest.approx(reference.vqa_consensus("a", people), abs=1e-12)


@pytest.mark.parametrize(
    ("people", "text"),
    [
        (["2"] * 10, "two"),
        (["yes"] * 10, "Yes."),
        (["cat"] * 10, "a cat"),
        (["don't know"] * 10, "Dont know!"),
        (["unanswerable"] * 10, "Unanswerable"),
        (["2", *["cats"] * 9], "Two."),
        (["T-shirt"] * 4 + ["a shirt"] * 6, "t shirt"),
        (["t-shirt"] * 10, "t-shirt"),
        (["Paris"] * 10, "paris"),
        ([" gray\n"] * 10, "gray"),
        (["1,000"] * 3 + ["1000"] * 7, "1,000"),
    ],
)
def test_val_is_scored_as_the_server_scores_the_submission(people, text):
    expected = reference.vqa_server(vqa.submitted(text), people)
    assert vqa.vqa_accuracy([Answer(people, text)]) == (pytest.approx(expected, abs=1e-12),)


def test_answers_are_normalised_before_they_are_scored_where_all_people_agree():
    assert vqa.vqa_accuracy([Answer(["2"] * 10, "two")]) == (1.0,)
    assert vqa.vqa_accuracy([Answer(["yes"] * 10, "Yes.")]) == (1.0,)
    # vqaEval.py normalises the human answers only where they differ, so the submitted "t shirt" is not theirs.
    assert vqa.vqa_accuracy([Answer(["t-shirt"] * 10, "t-shirt")]) == (0.0,)
    assert vqa.textvqa_accuracy([Answer(["t-shirt"] * 10, "t-shirt")]) == (1.0,)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or (C)", "C"),
        ("A and then B ", "B"),
        ("(A), not B", "A"),
        ("the answer must surely be Oak wood", "B"),
        ("I would say elm and not oak", "B"),
    ],
)
def test_mmmu_multiple_choice(text, letter):
    assert mmmu.choose(text, ["elm", "oak", "fir"], "id") == (letter, False)


def test_mmmu_guesses_where_nothing_is_found_and_says_so():
    found = {mmmu.choose("oak", ["elm", "oak", "fir"], f"id{n}") for n in range(50)}
    assert found == {("A", True), ("B", True), ("C", True)}
    assert mmmu.choose("oak", ["elm", "oak"], "same") == mmmu.choose("oak", ["elm", "oak"], "same")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("8,000", "8000", True),
        ("The profit is $8,000.", "8000", True),
        ("x = 3.141", "3.14", True),
        ("1e3", "1000", True),
        ("so it is 12 or 13", "13", True),
        ("12", "13", False),
        ("It could be Paris", "paris", True),
        ("Berlin", "Paris", False),
        ("x", "x", True),
        ("axe", "x", False),
        ("is:", "yes", False),
    ],
)
def test_mmmu_open_answers(text, answer, right):
    assert mmmu.open_right(text, [answer]) is right


def test_a_broken_table_of_mmbench_is_named(tmp_path):
    (tmp_path / "mmbench").mkdir()
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(DataError, match="is no MMBench table"):
        BENCHMARKS["mmbench"].read({path.name: path}, "dev")
    path.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tA\t\n")
    with pytest.raises(DataError, match="holds no rotated questions"):
        BENCHMARKS["mmbench"].read({path.name: path}, "dev")


def accuracy_units(right, count):
    return [Unit(str(n), (float(n < right),)) for n in range(count)]


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (7, 20), (500, 1000)])
def test_wilson_limits_solve_wilsons_equation(right, count):
    # The limits are the shares p at which the observed share lies exactly Z standard errors away.
    for limit in intervals.wilson(right, count):
        p = limit / 100
        assert (right / count - p) ** 2 == pytest.approx(intervals.Z**2 * p * (1 - p) / count, abs=1e-12)


def test_the_bootstrap_equals_drawing_unit_by_unit():
    random = np.random.default_rng(1)
    values = random.choice([0, 0.3, 0.6, 1], size=200)
    units = [Unit(str(n), (float(v),)) for n, v in enumerate(values)]
    means = 100 * values[random.integers(0, 200, (4000, 200))].mean(axis=1)
    low, high = intervals.bootstrap(units, lambda means: 100 * means["all"][..., 0])
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.4)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.4)
    assert (low, high) == intervals.bootstrap(units, lambda means: 100 * means["all"][..., 0])


def test_pairing_narrows_the_interval_of_a_difference():
    headline = BENCHMARKS["gqa"].headline
    ours, theirs = accuracy_units(60, 100), accuracy_units(55, 100)  # they agree but for five units
    found = intervals.paired_difference(ours, theirs, headline)
    assert found.difference == pytest.approx(5) and found.units == 100
    # Five of a hundred units differ, all in our favour: the standard error is sqrt(0.05 · 0.95 / 100).
    assert found.interval[0] == pytest.approx(5 - 1.96 * 2.18, abs=0.5)
    assert intervals.paired_difference(ours, ours, headline)[:2] == (0, (0, 0))
    assert intervals.paired_difference(ours, theirs[:80], headline).units == 80


def test_runs_without_common_units_are_not_compared():
    with pytest.raises(ValueError, match="share too few units"):
        intervals.paired_difference(accuracy_units(1, 3), [Unit("x", (1.0,))], BENCHMARKS["gqa"].headline)
