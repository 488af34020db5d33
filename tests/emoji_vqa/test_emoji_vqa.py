"""EmojiVQA from drawings of our own: the same bytes in any number of processes, and splits that differ as they say."""

import json
import shutil
from collections import Counter, defaultdict
from dataclasses import replace

import drawn_packages
import pytest
from click.testing import CliRunner
from PIL import Image

from switchkd.cli.main import main
from switchkd.errors import ConfigError, DataError, RunError
from switchkd.pipelines.emoji_vqa import build as module
from switchkd.pipelines.emoji_vqa import concepts, scenes
from switchkd.pipelines.emoji_vqa import packages as archives
from switchkd.pipelines.emoji_vqa.blind import blind_scores
from switchkd.pipelines.emoji_vqa.build import GREY, REPORT, build, lines_of, styles
from switchkd.pipelines.emoji_vqa.drawings import KNOWN_ARTISTS, NEW_ARTISTS, read_drawings
from switchkd.pipelines.emoji_vqa.options import IMAGES, EmojiVQAOptions
from switchkd.pipelines.emoji_vqa.packages import PACKAGES, fetch

pytest.importorskip("resvg_py", reason="drawings are rendered with resvg-py: extra `demo`")
pytest.importorskip("matplotlib", reason="numbers are set in matplotlib's fonts: extra `demo`")


@pytest.fixture(scope="module", autouse=True)
def own_concepts():
    """The concepts that were drawn here, in place of the list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kind_of", drawn_packages.kinds)
        yield


def options_of(folder, packages, **changed):
    return EmojiVQAOptions(
        **{"out": folder, "packages": packages[0], "share": 0.02, "size": 64, "workers": 0} | changed
    )


@pytest.fixture(scope="module")
def suite(packages, tmp_path_factory):
    return build(options_of(tmp_path_factory.mktemp("suite") / "emoji-vqa", packages, share=0.05), packages[1])


def rows_of(suite, split):
    return json.loads((suite.folder / f"{split}.json").read_text())


def turns(row):
    question, answer = (turn["value"] for turn in row["conversations"])
    return question.removeprefix("<image>\n"), answer


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_do_not_depend_on_the_number_of_processes(packages, tmp_path):
    found = [build(options_of(tmp_path / str(n) / "s", packages, workers=n), packages[1]).folder for n in (0, 2)]
    assert files_below(found[0]) == files_below(found[1])
    other = build(options_of(tmp_path / "seed", packages, seed=1), packages[1])
    assert other.report["sha256"] != json.loads((found[0] / REPORT).read_text())["sha256"]


def test_every_split_has_its_images_questions_and_grey_twin(suite):
    for split, count in IMAGES.items():
        rows = rows_of(suite, split)
        told = suite.report["splits"][split]
        names = {row["image"] for row in rows}
        assert told["images"] == len(names) == round(count * 0.05)
        assert told["questions"] == len(rows) == len({row["id"] for row in rows})
        assert told["kinds"] == Counter(row["question_type"] for row in rows)
        for name in names:
            with Image.open(suite.folder / "images" / name) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")
        grey = json.loads((suite.folder / f"grey/{split}.json").read_text())
        assert [row | {"image": GREY} for row in rows] == grey
    assert not list(suite.folder.parent.glob(".*"))


def test_splits_differ_as_they_say(suite):
    """Held-out combinations are asked in `combo` alone, new things in `concept` alone."""
    kinds = drawn_packages.kinds()
    made = styles(kinds)
    new = set(made["concept"].concepts)
    assert new and not new & set(made["train"].concepts) and all(kinds[name] for name in new)
    assert made["style"].artists == NEW_ARTISTS and made["train"].artists == KNOWN_ARTISTS
    asked = defaultdict(set)
    for split in IMAGES:
        for row in rows_of(suite, split):
            question, answer = turns(row)
            if row["question_type"] == "where":
                asked[split].add((answer, question.removesuffix("?").split(" of the ")[1]))
            if row["question_type"] == "read":
                asked[split].add(("read", answer.replace(" ", "")))
    assert all(scenes.is_held_out("where", *pair) for pair in asked["combo"] if pair[0] != "read")
    assert all(scenes.is_held_out(*pair) for pair in asked["combo"] if pair[0] == "read")
    for split in ("train", "val", "iid", "style", "degraded"):
        assert asked[split] and not asked[split] & asked["combo"], split
    assert {row["question_type"] for row in rows_of(suite, "combo")} <= set(scenes.COMBINED)
    assert {row["question_type"] for row in rows_of(suite, "concept")} == {"kind"}
    assert not any(name in json.dumps(rows_of(suite, split)) for name in new for split in ("train", "val", "style"))


def test_the_right_letter_turns_with_the_options(suite):
    units = defaultdict(list)
    for row in rows_of(suite, "iid"):
        if row["question_type"] == "choice":
            units[row["unit"]].append(turns(row))
    assert units
    for asked in units.values():
        assert sorted(answer for _, answer in asked) == list("abcd")
        named = set()
        for question, answer in asked:
            options = question.removeprefix("which is shown? ")
            start = options.index(f"{answer}. ") + 3
            following = [options.find(f" {letter}. ", start) for letter in "abcd"]
            named.add(options[start : min([at for at in following if at > 0], default=len(options))])
        assert len(named) == 1
    assert all("unit" not in row or row["question_type"] == "choice" for row in rows_of(suite, "iid"))
    assert sum(row["question_type"] == "choice" for row in rows_of(suite, "train")) == sum(
        row["question_type"] == "what" for row in rows_of(suite, "train")
    )


def test_colours_of_cards_are_those_in_the_image(packages):
    """The card's colour is around the drawing, and its place is what `where` says; drawings are left out."""
    kinds = drawn_packages.kinds()
    blank = {name: {artist: Image.new("RGBA", (64, 64)) for artist in KNOWN_ARTISTS} for name in kinds}
    style = replace(styles(kinds)["train"], scenes=("cards",), degraded=0.0)
    maker = scenes.SceneMaker(blank, kinds, style, 96, "cards")
    seen = 0
    for _ in range(40):
        image, asked = maker.make()
        cells = {}
        for column in (0, 1):
            for row in (0, 1):
                pixel = image.getpixel((int(96 * (0.26 + 0.48 * column)), int(96 * (0.26 + 0.48 * row))))
                cells[column, row] = next((color for color, value in scenes.COLORS.items() if value == pixel), None)
        for one in asked:
            if one.kind == "color" and one.answer != scenes.UNANSWERABLE:
                seen += 1
                assert one.answer in cells.values()
    assert seen > 10


def test_a_conversation_holds_all_questions_of_its_image_and_ends_with_the_caption(suite):
    """One row for each training image; its turns are those of `train.json`, in orders that differ, and its image comes once."""
    single = [*rows_of(suite, "train"), *rows_of(suite, "captions")]
    expected = defaultdict(list)
    for row in single:
        expected[row["image"]].append(turns(row))
    orders = set()
    for row in rows_of(suite, "conversations"):
        values = [turn["value"] for turn in row["conversations"]]
        assert values[0].startswith("<image>\n") and not any("<image>" in value for value in values[1:])
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(values) // 2)
        asked = list(zip([values[0].removeprefix("<image>\n"), *values[2::2]], values[1::2], strict=True))
        found = expected.pop(row["image"])
        assert asked[-1] == found[-1] and asked[-1][0] == scenes.DESCRIBE
        assert sorted(asked) == sorted(found)
        orders.add(tuple(found.index(one) for one in asked))
    assert not expected
    assert len(orders) > 10


def test_a_second_start_does_nothing_and_other_options_are_refused(suite, packages, monkeypatch):
    monkeypatch.setattr(module, "read_drawings", None)
    same = options_of(suite.folder, packages, share=0.05)
    assert build(same, packages[1]).report == suite.report
    with pytest.raises(ConfigError, match="was built with .* pass another --out"):
        build(replace(same, seed=3), packages[1])


@pytest.mark.parametrize("name", ["captions.json", "conversations.json"])
def test_a_suite_of_an_earlier_version_is_refused(packages, tmp_path, name):
    same = options_of(tmp_path / "s", packages)
    (build(same, packages[1]).folder / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}: an earlier version built it; remove it or pass another"):
        build(same, packages[1])


def test_an_interrupted_build_leaves_nothing_behind_that_counts(packages, tmp_path, monkeypatch):
    given = options_of(tmp_path / "s", packages)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(given, packages[1])
    assert not given.out.exists()
    build(given, packages[1])
    assert (given.out / REPORT).is_file() and not (tmp_path / ".s.unfinished").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        build(replace(given, out=tmp_path / "full"), packages[1])


def test_an_archive_that_is_not_the_pinned_one_is_refused(packages, tmp_path):
    folder = shutil.copytree(packages[0], tmp_path / "packages")
    with pytest.raises(DataError, match=r"is not the pinned archive of openmoji@17.0.0: expected sha512-EBnY"):
        fetch(folder, PACKAGES)


def test_what_is_missing_is_fetched_from_the_registry_or_with_npm(packages, tmp_path, monkeypatch):
    folder = shutil.copytree(packages[0], tmp_path / "packages")
    first = packages[1][0]
    (folder / first.archive).unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(archives, "REGISTRY", (tmp_path / "registry").as_uri())
    with pytest.raises(RunError, match=r"no npm to fetch it, and .*cannot be read: .*run `npm pack openmoji@17.0.0`"):
        fetch(folder, packages[1])
    there = tmp_path / "registry/openmoji/-/openmoji-17.0.0.tgz"
    there.parent.mkdir(parents=True)
    shutil.copy(packages[0] / first.archive, there)
    assert fetch(folder, packages[1])["openmoji"].is_file()
    (folder / first.archive).unlink()
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin/npm"
    npm.write_text('#!/bin/sh\n[ "$1 $2 $3" = "pack --silent openmoji@17.0.0" ] || exit 9\necho offline >&2\nexit 1\n')
    npm.chmod(0o755)
    with pytest.raises(RunError, match="npm pack --silent openmoji@17.0.0 failed: offline"):
        fetch(folder, packages[1])
    npm.write_text(f'#!/bin/sh\n/bin/cp "{packages[0] / first.archive}" .\n')
    assert fetch(folder, packages[1])["openmoji"].is_file()


def test_a_drawing_that_is_missing_is_named(packages):
    archives = fetch(*packages)
    with pytest.raises(DataError, match=r"has no drawing of 'yak'"):
        read_drawings(archives, ["cat", "yak"], 32)
    found = read_drawings(archives, ["cat", "star"], 32)
    assert {picture.size for art in found.values() for picture in art.values()} == {(32, 32)}
    assert found["cat"]["noto"].getpixel((16, 16)) == (255, 0, 0, 255)
    assert found["cat"]["openmoji"].getpixel((16, 2))[3] == 0


def test_the_list_of_concepts_is_sound():
    listed = concepts.kind_of()
    assert len(listed) == 364
    assert all(name == name.lower() and 1 <= len(name.split()) <= 2 for name in listed)
    table = concepts._table()
    assert {*table["plural"], *table["mass"]} <= set(listed)
    every = [name for names in table["kinds"].values() for name in names] + table["objects"]
    assert len(every) == len(set(every))
    assert (concepts.with_article("owl"), concepts.with_article("cat")) == ("an owl", "a cat")
    assert (concepts.with_article("sushi"), concepts.is_are("grapes")) == ("sushi", "are")


def row(kind, question, answer, unit=""):
    turns = [{"value": f"<image>\n{question}"}, {"value": answer}]
    return {"id": f"{kind}{question}{answer}", "question_type": kind, "conversations": turns} | (
        {"unit": unit} if unit else {}
    )


def test_a_blind_reader_knows_what_the_questions_alone_tell():
    train = [row("a", "is the cat red?", "yes"), row("a", "is the cat red?", "yes"), row("a", "is the cat red?", "no")]
    train += [row("a", "is the dog red?", "no"), *[row("b", "how many dogs?", n) for n in ("two", "two", "one")]]
    test = [row("a", "is the cat red?", "yes"), row("a", "is the dog red?", "no"), row("b", "how many cats?", "two")]
    assert blind_scores(train, test, ("cat", "dog")) == {"a": 1.0, "b": 1.0}
    # A unit is right only if all of its questions are.
    turned = [row("b", "how many dogs?", "two", "u"), row("b", "how many cats?", "one", "u")]
    assert blind_scores(train, turned, ("cat", "dog")) == {"b": 0.0}
    assert blind_scores(train, [row("c", "where?", "there")], ("cat",)) == {"c": 0.0}


def test_the_questions_of_the_suite_do_not_give_themselves_away(suite):
    """Of questions of yes and no, a blind reader answers about a half; choices it never gets right in all rotations."""
    for split in ("iid", "style"):
        blind = suite.report["splits"][split]["blind"]
        assert blind["choice"] == 0
        assert blind["read"] < 0.1
    assert suite.report["splits"]["combo"]["blind_macro"] < 0.35


def test_data_check_and_eval_take_it(suite):
    done = CliRunner().invoke(
        main, ["data", "check", str(suite.folder / "style.json"), "--images", str(suite.folder / "images")]
    )
    assert done.exit_code == 0, done.output
    assert "would be skipped: 0 (0.00%)" in done.output and "odd, and used" not in done.output
    from switchkd.pipelines.evaluation.benchmarks.base import units_of
    from switchkd.pipelines.evaluation.benchmarks.emoji_vqa import EMOJI_VQA
    from switchkd.pipelines.evaluation.benchmarks.layouts import find_files
    from switchkd.pipelines.evaluation.intervals import by_stratum, means_of

    questions = EMOJI_VQA.read(find_files(EMOJI_VQA, suite.folder.parent, "style"), "style")
    right = units_of(EMOJI_VQA, questions, {question.id: question.reference for question in questions})
    assert EMOJI_VQA.headline(means_of(by_stratum(right))) == 100
    assert set(EMOJI_VQA.details(right)) == {*suite.report["splits"]["style"]["kinds"], "micro"}
    assert questions[0].load()[:2] == b"\xff\xd8"


def test_the_command_tells_splits_blind_scores_and_what_was_drawn_with(suite):
    told = lines_of(suite)
    assert [line.split()[0] for line in told[1 : 1 + len(IMAGES)]] == list(IMAGES)
    assert not any("published" in line for line in told)  # another size
    usual = replace(suite, report=suite.report | {"settings": {"size": 96, "share": 1.0, "seed": 0}})
    assert lines_of(usual)[-1].startswith(
        "warning: questions and images differ from those of the published suite; drawn with"
    )
    same = replace(usual, report=usual.report | {"sha256": dict(module.PUBLISHED)})
    assert lines_of(same)[-1] == "questions and images are those of the published suite, byte for byte"
    assert "CC BY-SA 4.0" in (suite.folder / "LICENCES.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="the packages are fetched with npm (26 MB)")
def test_the_whole_suite_is_the_published_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "kind_of", concepts.kind_of)
    built = build(EmojiVQAOptions(out=tmp_path / "emoji-vqa"))
    assert built.as_published == {"questions": True, "images": True}
